"""Grouped-query projections: what the kinds share that choose among whole blocks of tokens."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.config import RopeConfig
from moe_jax.models.attention.base import Cache, Where, rope_frequencies
from moe_jax.models.layers import matmul, matrix
from moe_jax.ops.blocks import Span
from moe_jax.ops.rope import rotate_half_split, yarn_softmax_factor
from moe_jax.precision import Policy

# B batch  S new tokens  T cached tokens  D model  G key-value heads  M query heads of each
# C key width  V value width


class GroupedAttention(nn.Module):
  """Base of the block-sparse kinds: num_heads queries in num_kv_heads groups, half-split RoPE."""

  cfg: Any  # NSAConfig or MoBAConfig
  rope: RopeConfig
  std: float
  eps: float
  policy: Policy

  @property
  def scale(self) -> float:
    """What scores are multiplied by before the softmax."""
    factor = yarn_softmax_factor(self.rope.yarn_factor, self.rope.yarn_mscale_all_dim)
    return self.cfg.d_head**-0.5 * factor

  def rotate(self, x_BTGC: jax.Array, position_BT: jax.Array) -> jax.Array:
    freq = rope_frequencies(self.cfg.d_head, self.rope)
    return rotate_half_split(x_BTGC, position_BT, freq) * self.rope.yarn_magnitude

  def queries(self, x_BSD: jax.Array, where: Where) -> jax.Array:
    """Rotated queries [B, S, G, M, C]."""
    c = self.cfg
    G, M = c.num_kv_heads, c.num_heads // c.num_kv_heads
    q_BSGMC = self.by_group('q_DGMC', x_BSD, (G, M, c.d_head))
    return jax.vmap(lambda q: self.rotate(q, where.position_BS), in_axes=3, out_axes=3)(q_BSGMC)

  def by_group(self, name: str, x_BSD: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """A linear map of the stream to [B, S, *shape], `shape` beginning with the groups."""
    w = matrix(self, name, (x_BSD.shape[-1], *shape), sh.GROUPS_DGMC, std=self.std)
    return matmul('bsd,dgmc->bsgmc', x_BSD, w, sh.GROUPS_DGMC, policy=self.policy)

  def keys(self, name: str, x_BSD: jax.Array, width: int) -> jax.Array:
    """A linear map of the stream to [B, S, G, width]."""
    w = matrix(
      self, name, (x_BSD.shape[-1], self.cfg.num_kv_heads, width), sh.HEADS_DHC, std=self.std
    )
    return matmul('bsd,dgc->bsgc', x_BSD, w, sh.HEADS_DHC, policy=self.policy)

  def output(self, o_BSGMV: jax.Array, d_model: int) -> jax.Array:
    shape = (*o_BSGMV.shape[2:], d_model)
    out_GMVD = matrix(self, 'out_GMVD', shape, sh.GROUPS_GMCD, std=self.std)
    return matmul(
      'bsgmv,gmvd->bsd', o_BSGMV, out_GMVD, sh.GROUPS_GMCD, policy=self.policy, out=sh.STREAM
    )


def span(where: Where, cache: Cache | None) -> Span:
  """Where queries and keys stand; a cache holds one document a row, from its beginning.

  Places of the cache that are not filled lie behind every query.
  """
  if cache is None:
    segment, position = where.segment_BS, where.position_BS
    return Span(segment, position, segment, position, where.start_B)
  rows, length = next(iter(cache.values())).shape[:2]
  k_position_BT = jnp.broadcast_to(jnp.arange(length), (rows, length), out_sharding=sh.TOKENS)
  ones_BS, ones_BT = jnp.ones_like(where.segment_BS), jnp.ones_like(k_position_BT)
  return Span(ones_BS, where.position_BS, ones_BT, k_position_BT, where.start_B)


def empty_heads(names: dict[str, int], groups: int, batch: int, length: int, dtype: Any) -> Cache:
  """Zeros [batch, length, groups, width] for each name and its width."""
  return {
    name: jnp.zeros((batch, length, groups, width), dtype, out_sharding=sh.HEADS)
    for name, width in names.items()
  }
