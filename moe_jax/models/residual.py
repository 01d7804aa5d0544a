"""How a layer reads the residual stream and writes to it: one stream, or several mixed ones.

A kind has three parts: `enter` makes its stream of the embedding, a `site` reads a layer's input
from it and writes the layer's output back, and `leave` makes the last hidden state of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.config import ModelConfig
from moe_jax.models.layers import weight
from moe_jax.ops import hyper_connections as hc

# B batch  S sequence  D model  J streams  X mixing numbers of a token

Write = Callable[[jax.Array], jax.Array]


class Plain(nn.Module):
  """x + layer(x)."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array) -> tuple[jax.Array, Write]:
    """The layer's input, and a function from its output to the stream after it."""
    return x_BSD, lambda y_BSD: x_BSD + y_BSD


class PlainLeave(nn.Module):
  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    return x_BSD


class HyperConnection(nn.Module):
  """Reads a mixture of the streams [B, S, J, D], writes to all. Source: arXiv:2606.19348, 2.1.

  The source does not publish starting values. Here all streams are read and written alike and each
  keeps to itself, which makes the model start as a plain one.
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BSJD: jax.Array) -> tuple[jax.Array, Write]:
    c, (J, D) = self.cfg.mhc, x_BSJD.shape[2:]
    X = J + J + J * J

    def base(_: Any) -> jax.Array:
      # 5 on the diagonal of comb: a stream keeps 0.98 of itself
      own_X = jnp.concatenate([jnp.zeros(J + J), 5 * jnp.eye(J).reshape(-1)])
      return jax.sharding.reshard(own_X, sh.VECTOR)

    mix = hc.mixing(
      x_BSJD,
      _function(self, (J, D, X)),
      self.param('base_X', base),
      self.param('scale_3', _constant, (3,), c.init_scale),
      iterations=c.sinkhorn_iterations,
      eps=c.eps,
      norm_eps=self.cfg.norm_eps,
    )
    return hc.read(x_BSJD, mix.pre_BSJ), lambda y_BSD: hc.write(x_BSJD, y_BSD, mix)


class HyperHead(nn.Module):
  """Reads the last hidden state from the streams."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BSJD: jax.Array) -> jax.Array:
    c, (J, D) = self.cfg.mhc, x_BSJD.shape[2:]
    y_BSJ = hc.gates(x_BSJD, _function(self, (J, D, J)), norm_eps=self.cfg.norm_eps)
    scale_1 = self.param('scale_1', _constant, (1,), c.init_scale)
    base_J = self.param('base_J', _constant, (J,), 0.0)
    return hc.read(x_BSJD, jax.nn.sigmoid(y_BSJ * scale_1 + base_J) + c.eps)


def _function(module: Any, shape: tuple[int, int, int]) -> jax.Array:
  fn_JDX = weight(module, 'fn_JDX', shape, sh.STREAMS_JDX, std=module.cfg.init_std)
  return jax.sharding.reshard(fn_JDX, sh.gathered(sh.STREAMS_JDX))


def _constant(_: Any, shape: tuple[int, ...], value: float) -> jax.Array:
  return jnp.full(shape, value, jnp.float32, out_sharding=sh.VECTOR)


def _copies(cfg: ModelConfig, x_BSD: jax.Array) -> jax.Array:
  B, S, D = x_BSD.shape
  shape = (B, S, cfg.mhc.num_streams, D)
  return jnp.broadcast_to(x_BSD[:, :, None], shape, out_sharding=sh.STREAMS)


class Residual(NamedTuple):
  enter: Callable[[ModelConfig, jax.Array], jax.Array]
  site: Callable[..., Any]
  leave: Callable[..., Any]


# by the name that a config uses
RESIDUALS = {
  'plain': Residual(lambda cfg, x_BSD: x_BSD, Plain, PlainLeave),
  'mhc': Residual(_copies, HyperConnection, HyperHead),
}
