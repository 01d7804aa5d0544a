"""DSA's attention over the keys that its indexer picks, gathered: no scores of all pairs.

On each device of the mesh: its rows of the batch and its heads. The indexer's choice is the same
for all heads, so devices of one row make it each for itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.ops.attention.bounds import visible_bounds
from moe_jax.ops.decode_attention import sparse_decode_attention
from moe_jax.ops.indexer import (
  dense_index_loss,
  index_scores,
  select_from_scores,
  select_keys,
  sparse_index_loss,
)
from moe_jax.ops.sparse_mla import key_mass, sparse_mla, unsupported

# B batch  S new tokens  T cached tokens  H heads  R latent width  C rope width  J index heads
# I index width  K chosen keys  N rows of all queries (B*S)

# fewer new tokens than this over a cache: scores of all rows at once, not row by row
_FEW = 64


class Latents(NamedTuple):
  """What MLA attends with in the absorbed form; T = S without a cache."""

  q_BSHR: jax.Array
  q_rope_BSHC: jax.Array
  latent_BTR: jax.Array
  rope_BTC: jax.Array


class Index(NamedTuple):
  """What the indexer scores with, and each query's range of keys."""

  q_BSJI: jax.Array
  k_BTI: jax.Array
  weight_BSJ: jax.Array
  first_BS: jax.Array
  end_BS: jax.Array


_LATENTS = Latents._make((sh.HEADS, sh.HEADS, sh.STREAM, sh.STREAM))
_ALL_HEADS = jax.P(sh.BATCH, None, None, None)
_INDEX = Index._make((_ALL_HEADS, sh.STREAM, sh.STREAM, sh.TOKENS, sh.TOKENS))


def serves(q_BSHR: jax.Array, q_rope_BSHC: jax.Array) -> bool:
  """Whether there is a kernel for a device's share of the heads; without one masks are faster."""
  B, S, H, R = q_BSHR.shape
  heads = H // jax.sharding.get_abstract_mesh().shape[sh.MODEL]
  share = jax.ShapeDtypeStruct((B * S, heads, R), q_BSHR.dtype)
  rope = jax.ShapeDtypeStruct((B * S, heads, q_rope_BSHC.shape[-1]), q_rope_BSHC.dtype)
  return unsupported(share, rope) is None


def ranges(segment_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """First key and end of the keys of each query: its document up to itself."""
  first_BS, _ = visible_bounds(segment_BS, None)
  return first_BS, first_BS * 0 + jnp.arange(segment_BS.shape[1], dtype=jnp.int32) + 1


def attend(
  latents: Latents, index: Index, importance_BS: jax.Array | None, *, k: int, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Weighted latents [B, S, H, R] of the k best keys, and the indexer's loss of each row [B].

  Args:
    importance_BS: weights of the queries' divergences in the loss; None makes no loss.
  """
  if importance_BS is None:
    operands, specs = (latents, index), (_LATENTS, _INDEX)
  else:
    operands, specs = (latents, index, importance_BS), (_LATENTS, _INDEX, sh.TOKENS)

  def on_device(latents: Latents, index: Index, importance_BS: jax.Array | None = None):
    B, S = index.first_BS.shape
    flat = lambda a: a.reshape(B * S, *a.shape[2:])
    rows = index.q_BSJI, index.k_BTI, index.weight_BSJ, index.first_BS, index.end_BS
    index_BSK, count_BS = jax.lax.map(lambda row: select_keys(*row, k=k), rows)
    offset_B11 = (jnp.arange(B, dtype=jnp.int32) * S)[:, None, None]
    index_NK, count_N = flat(index_BSK + offset_B11), flat(count_BS)
    q, q_rope, latent, rope = map(flat, latents)
    o_NHR, lse_NH = sparse_mla(q, q_rope, latent, rope, index_NK, count_N, scale=scale)
    o_BSHR = o_NHR.reshape(latents.q_BSHR.shape)
    if importance_BS is None:
      return o_BSHR, jnp.zeros((B,), jnp.float32)
    mass_NK = key_mass(q, q_rope, latent, rope, index_NK, count_N, lse_NH, scale=scale)
    num_heads = q.shape[1] * jax.lax.axis_size(sh.MODEL)
    target_NK = jax.lax.psum(mass_NK, sh.MODEL) / num_heads
    target_BSK = jax.lax.stop_gradient(target_NK).reshape(index_BSK.shape)
    losses = *rows[:3], index_BSK, count_BS, target_BSK, importance_BS
    return o_BSHR, jax.lax.map(lambda row: sparse_index_loss(*row), losses)

  return jax.shard_map(
    on_device, in_specs=specs, out_specs=(sh.HEADS, sh.BY_ROW),
    check_vma=False,  # kernels carry no such types
  )(*jax.tree.map(jax.sharding.reshard, operands, specs))  # fmt: skip


def attend_cache(latents: Latents, index: Index, *, k: int, scale: float) -> jax.Array:
  """Weighted latents of new tokens over the k best places of a cache. Passes no gradient."""

  def on_device(latents: Latents, index: Index):
    S = index.first_BS.shape[1]
    if S < _FEW:
      score_BST = index_scores(index.q_BSJI, index.k_BTI, index.weight_BSJ)
      index_BSK, count_BS = select_from_scores(score_BST, index.first_BS, index.end_BS, k=k)
    else:
      index_BSK, count_BS = jax.lax.map(lambda row: select_keys(*row, k=k), tuple(index))
    return sparse_decode_attention(*latents, index_BSK, count_BS, scale=scale)

  operands, specs = (latents, index), (_LATENTS, _INDEX)
  return jax.shard_map(on_device, in_specs=specs, out_specs=sh.HEADS, check_vma=False)(
    *jax.tree.map(jax.sharding.reshard, operands, specs)
  )


def warmup_loss(
  indexer: tuple[jax.Array, jax.Array, jax.Array],
  q_BSHX: jax.Array,
  k_BSHX: jax.Array,
  segment_BS: jax.Array,
  importance_BS: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """The indexer's loss [B] against attention to every key, some queries at a time."""

  def on_device(*operands: jax.Array) -> jax.Array:
    one_row = lambda row: dense_index_loss(*row, scale=scale, head_axis=sh.MODEL)
    return jax.lax.map(one_row, operands)

  operands = *indexer, q_BSHX, k_BSHX, segment_BS, importance_BS
  specs = *_INDEX[:3], sh.HEADS, sh.HEADS, sh.TOKENS, sh.TOKENS
  return jax.shard_map(on_device, in_specs=specs, out_specs=sh.BY_ROW, check_vma=False)(
    *map(jax.sharding.reshard, operands, specs)
  )
