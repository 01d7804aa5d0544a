"""Parameter declarations and the small layers: norm, linear maps, dense feed-forward."""

import math
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name

from moe_jax import sharding as sh
from moe_jax.ops.feed_forward import Three, feed_forward
from moe_jax.ops.linear import Weights, linear
from moe_jax.ops.norm import layer_norm, rms_norm
from moe_jax.ops.recipe import Recipe
from moe_jax.ops.swiglu import swiglu
from moe_jax.ops.varying import match_vma
from moe_jax.precision import Policy

# B batch  S sequence  D model  F width


def weight(
  module: nn.Module, name: str, shape: tuple[int, ...], spec: P, *, std: float
) -> jax.Array:
  """Declares a float32 master weight, normal with the given deviation, already split by `spec`."""
  init = jax.nn.initializers.normal(std)
  return module.param(name, lambda key: init(key, shape, jnp.float32, spec))


class Matrix(NamedTuple):
  """A stored matrix, and what FP8 products read of it where a step has quantised it beforehand."""

  value: jax.Array
  ready: Weights = Weights(None, None)


def matrix(module: nn.Module, name: str, shape: tuple[int, ...], spec: P, *, std: float) -> Matrix:
  """`weight` that products multiply with; collection `fp8` of `precision.quantized_copy`."""
  value = weight(module, name, shape, spec, std=std)
  if not module.has_variable('fp8', name):
    return Matrix(value)
  return Matrix(value, cast(Weights, module.get_variable('fp8', name)))


def matmul(
  equation: str,
  x: jax.Array,
  w: jax.Array | Matrix,
  spec: P,
  *,
  policy: Policy,
  out: P | None = None,
) -> jax.Array:
  """einsum of activations with a stored weight, whose FSDP share is gathered for use.

  A product of matrices, x's last dimensions with w's first, follows the policy's recipe for linear
  layers; anything else is computed in the activations' dtype.

  Args:
    spec: how `w` is stored; its `data` share is gathered for use and its gradient scattered back.
    out: the result's spec, where a contraction over a split dimension makes it ambiguous.
  """
  dims = _matrix_dims(equation)
  value, ready = w if isinstance(w, Matrix) else Matrix(w)
  if policy.plain or dims is None:
    value = jax.sharding.reshard(policy.cast(value), sh.gathered(spec))
    return jnp.einsum(equation, x, value, out_sharding=out)
  return _by_recipe(x, _gathered(value, spec, policy), ready, policy.linear, *dims)


def _gathered(w: jax.Array, spec: P, policy: Policy) -> jax.Array:
  """A stored weight as products by a recipe take it, in the dtype that its gradient is to have."""
  if policy.gradients == policy.activations:
    w = policy.cast(w)
  return jax.sharding.reshard(w, sh.gathered(spec))


def _matrix_dims(equation: str) -> tuple[int, int] | None:
  """(leading dimensions of x, contracted ones) of an einsum that is x_TK w_KN, else None."""
  x, w, out = equation.replace('->', ',').split(',')
  lead = next((i for i, name in enumerate(x) if name in w), len(x))
  contracted = len(x) - lead
  plain = x[lead:] == w[:contracted] and out == x[:lead] + w[contracted:]
  return (lead, contracted) if plain else None


def _by_recipe(
  x: jax.Array, w: jax.Array, ready: Weights, recipe: Recipe, lead: int, contracted: int
) -> jax.Array:
  """x w on each device's rows and its share of w; partial sums of a split contraction are added."""
  x_spec, w_spec = ((*_spec(a), *(None,) * a.ndim)[: a.ndim] for a in (x, w))
  split = [axis for axis in w_spec[:contracted] if axis is not None]

  def on_device(x: jax.Array, w: jax.Array, ready: Weights) -> jax.Array:
    x_TK = x.reshape(-1, math.prod(w.shape[:contracted]))
    w_KN = w.reshape(x_TK.shape[1], -1)
    x_TK, w_KN, ready = match_vma(x_TK, w_KN, ready)
    y_TN = linear(x_TK, w_KN, recipe, ready=ready)
    y = y_TN.reshape(*x.shape[:lead], *w.shape[contracted:])
    return jax.lax.psum(y, tuple(split)) if split else y

  out_spec = P(*x_spec[:lead], *w_spec[contracted:])
  in_specs = P(*x_spec), P(*w_spec), P()
  return jax.shard_map(on_device, in_specs=in_specs, out_specs=out_spec)(x, w, ready)


def _spec(a: jax.Array) -> P:
  return jax.typeof(a).sharding.spec


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
    gate_DF = matrix(self, 'gate_DF', (D, F), sh.MATRIX_DF, std=self.std)
    up_DF = matrix(self, 'up_DF', (D, F), sh.MATRIX_DF, std=self.std)
    down_FD = matrix(self, 'down_FD', (F, D), sh.MATRIX_FD, std=self.std)
    if not self.policy.plain:
      return self._by_recipe(x_BSD, Three(gate_DF, up_DF, down_FD))
    gate_BSF = matmul('bsd,df->bsf', x_BSD, gate_DF, sh.MATRIX_DF, policy=self.policy)
    up_BSF = matmul('bsd,df->bsf', x_BSD, up_DF, sh.MATRIX_DF, policy=self.policy)
    gate_BSF, up_BSF = checkpoint_name((gate_BSF, up_BSF), 'dense_hidden')
    h_BSF = swiglu(gate_BSF, up_BSF, limit=self.swiglu_limit)
    return matmul('bsf,fd->bsd', h_BSF, down_FD, sh.MATRIX_FD, policy=self.policy, out=sh.STREAM)

  def _by_recipe(self, x_BSD: jax.Array, matrices: Three) -> jax.Array:
    """On each device's rows and its share of the width; partial sums are added."""
    gathered = Three(
      *(
        _gathered(m.value, spec, self.policy)
        for m, spec in zip(matrices, (sh.MATRIX_DF, sh.MATRIX_DF, sh.MATRIX_FD), strict=True)
      )
    )
    x_spec = (*_spec(x_BSD), None, None, None)[:3]
    split = _spec(gathered.down)[0]

    def on_device(x_BSD: jax.Array, weights: Three, ready: Three) -> jax.Array:
      x_TD, weights, ready = match_vma(x_BSD.reshape(-1, x_BSD.shape[-1]), weights, ready)
      recipe, limit = self.policy.linear, self.swiglu_limit
      y_TD = feed_forward(x_TD, weights, recipe, limit=limit, ready=ready)
      y_BSD = y_TD.reshape(x_BSD.shape)
      return jax.lax.psum(y_BSD, split) if split else y_BSD

    specs = Three(*(P(*_spec(w)) for w in gathered))
    ready = Three(*(m.ready for m in matrices))
    body = jax.shard_map(on_device, in_specs=(P(*x_spec), specs, P()), out_specs=P(*x_spec))
    return body(x_BSD, gathered, ready)
