"""What every attention kind shares: where tokens stand, and how a cache grows."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.config import RopeConfig
from moe_jax.ops.rope import frequencies

# B batch  S new tokens  T cached tokens  D model

Cache = dict[str, Any]  # arrays by name, nested where a kind has parts
Aux = dict[str, jax.Array]  # scalars of one layer: losses, named *_loss, and measurements


class Where(NamedTuple):
  """What the new tokens are and where they stand, the same for every layer.

  Without a cache the new tokens are all there is, and `start_B` is 0.
  """

  token_BS: jax.Array  # int32 ids
  position_BS: jax.Array  # int32, within the document
  segment_BS: jax.Array  # int32 document number, 0 for padding
  start_B: jax.Array  # int32 tokens in the cache before the new ones


def spread(where: Where) -> Where:
  """Splits every part by row, as the stream is: what is mapped over rows must agree."""
  split = lambda a: jax.sharding.reshard(a, sh.BY_ROW if a.ndim == 1 else sh.TOKENS)
  return Where(*map(split, where))


class Attention(Protocol):
  """A kind of attention: a Flax module made as kind(cfg, rope, std, eps, policy).

  Called with the normed stream [B, S, D], a Where, and this layer's cache or None, it returns the
  output [B, S, D], the grown cache, and its Aux.
  """

  def __call__(
    self, x_BSD: jax.Array, where: Where, cache: Cache | None
  ) -> tuple[jax.Array, Cache | None, Aux]: ...

  @staticmethod
  def empty_cache(cfg: Any, batch: int, length: int, dtype: Any) -> Cache:
    """Room for `length` tokens in each of `batch` rows."""
    ...


def append(cache: Cache, new: Cache, start_B: jax.Array) -> Cache:
  """Writes the new tokens' entries [B, S, ...] behind the `start_B` already there."""

  def write(old, rows, start):
    return jax.lax.dynamic_update_slice_in_dim(old, rows.astype(old.dtype), start, axis=0)

  return {name: jax.vmap(write)(cache[name], new[name], start_B) for name in cache}


def rope_frequencies(width: int, rope: RopeConfig):
  """Radians a position for each pair of `width` rotated channels."""
  return frequencies(
    width,
    base=rope.base,
    yarn_factor=rope.yarn_factor,
    yarn_original_length=rope.yarn_original_length,
    yarn_beta_fast=rope.yarn_beta_fast,
    yarn_beta_slow=rope.yarn_beta_slow,
  )


def cached_segments(cache_entry: jax.Array) -> jax.Array:
  """Document numbers of a cache's places: one document a row, what is not filled yet included.

  The causal rule hides the places that are not filled.
  """
  return jnp.ones(cache_entry.shape[:2], jnp.int32)
