"""Parameter declarations and the small layers: norm, linear maps, dense feed-forward."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import P

from moe_jax import sharding as sh
from moe_jax.ops.norm import layer_norm, rms_norm
from moe_jax.ops.swiglu import swiglu
from moe_jax.precision import Policy

# B batch  S sequence  D model  F width


def weight(
  module: nn.Module, name: str, shape: tuple[int, ...], spec: P, *, std: float
) -> jax.Array:
  """Declares a float32 master weight, normal with the given deviation, already split by `spec`."""
  init = jax.nn.initializers.normal(std)
  return module.param(name, lambda key: init(key, shape, jnp.float32, spec))


def matmul(
  equation: str, x: jax.Array, w: jax.Array, spec: P, *, policy: Policy, out: P | None = None
) -> jax.Array:
  """einsum of activations with a stored weight, whose FSDP share is gathered in compute precision.

  Args:
    spec: how `w` is stored; its `data` share is gathered for use and its gradient scattered back.
    out: the result's spec, where a contraction over a split dimension makes it ambiguous.
  """
  w = jax.sharding.reshard(policy.cast(w), sh.gathered(spec))
  return jnp.einsum(equation, x, w, out_sharding=out)


class RMSNorm(nn.Module):
  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    ones = lambda key: jnp.ones((x.shape[-1],), jnp.float32, out_sharding=sh.VECTOR)
    return rms_norm(x, self.param('weight_D', ones), eps=self.eps)


class LayerNorm(nn.Module):
  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape, spec = (x.shape[-1],), sh.VECTOR
    ones = lambda key: jnp.ones(shape, jnp.float32, out_sharding=spec)
    zeros = lambda key: jnp.zeros(shape, jnp.float32, out_sharding=spec)
    return layer_norm(x, self.param('weight_D', ones), self.param('bias_D', zeros), eps=self.eps)


class FeedForward(nn.Module):
  """down(silu(gate x) * up x). Source: arXiv:2002.05202."""

  d_ff: int
  std: float
  policy: Policy
  swiglu_limit: float = 0.0  # see ops.swiglu

  @nn.compact
  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    D, F = x_BSD.shape[-1], self.d_ff
    gate_DF = weight(self, 'gate_DF', (D, F), sh.MATRIX_DF, std=self.std)
    up_DF = weight(self, 'up_DF', (D, F), sh.MATRIX_DF, std=self.std)
    down_FD = weight(self, 'down_FD', (F, D), sh.MATRIX_FD, std=self.std)
    gate_BSF = matmul('bsd,df->bsf', x_BSD, gate_DF, sh.MATRIX_DF, policy=self.policy)
    up_BSF = matmul('bsd,df->bsf', x_BSD, up_DF, sh.MATRIX_DF, policy=self.policy)
    h_BSF = swiglu(gate_BSF, up_BSF, limit=self.swiglu_limit)
    return matmul('bsf,fd->bsd', h_BSF, down_FD, sh.MATRIX_FD, policy=self.policy, out=sh.STREAM)
