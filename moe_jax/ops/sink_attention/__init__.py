"""Attention of many heads over one key that is the value too, with a learned sink.

`compressed_attention` is V4's, on whole rows: 'mosaic' (Hopper, heads of 512) or 'reference', masks
over all pairs, which defines it.
"""

# B batch  S queries  N compressed entries  H heads  C head width  K index slots

import jax
import jax.numpy as jnp
from jax import P

from moe_jax import sharding as sh
from moe_jax.ops.backends import choose
from moe_jax.ops.sink_attention import mosaic, mosaic_gather, reference
from moe_jax.ops.sink_attention.reference import entries_visible, sink_attention, window_visible
from moe_jax.ops.sink_attention.spans import Spans, spans, visible

__all__ = [
  'SLOT_BLOCK',
  'Spans',
  'chosen_mass',
  'compressed_attention',
  'entries_visible',
  'sink_attention',
  'spans',
  'unsupported',
  'visible',
  'window_visible',
]

unsupported = mosaic.unsupported
# the kernel takes an index in multiples of so many slots
SLOT_BLOCK = mosaic_gather.BLOCK


def compressed_attention(
  q_BSHC: jax.Array,
  key_BSC: jax.Array,
  entry_BNC: jax.Array,
  sink_H: jax.Array,
  seen: Spans,
  index_BSK: jax.Array | None = None,
  *,
  window: int,
  scale: float,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """sink_attention over each query's window of tokens and its entries.

  Deterministic. Differentiable in q, key, entry and sink.

  Args:
    entry_BNC: N may be 0.
    seen: from `spans`. `window` is the one given there.
    index_BSK: the entries that a query sees, by index in the row, in its first K or `entry_count`
      slots; the rest must name entries too and is not read. None: all of its run.
    implementation: 'mosaic' or 'reference', which then runs or raises NotImplementedError with the
      reason. None takes the fastest that can.

  Returns:
    The output, and the base-2 logsumexp [B, S, H], sink included, without a gradient.
  """
  problem = unsupported(q_BSHC, key_BSC, index_BSK)
  if choose('compressed_attention', implementation, problem, fallback='reference') == 'reference':
    mask_BST = jnp.concatenate(visible(seen, entry_BNC.shape[1], index_BSK), axis=-1)
    both_BTC = jnp.concatenate([key_BSC, entry_BNC], axis=1)
    o_BSHC, _ = sink_attention(q_BSHC, both_BTC, sink_H, mask_BST, scale=scale)
    args = jax.lax.stop_gradient((q_BSHC, both_BTC, sink_H))
    return o_BSHC, reference.logsumexp(*args, mask_BST, scale=scale)

  def on_device(*args):
    return mosaic.attention(*args, window=window, scale=scale)

  args = (q_BSHC, key_BSC, entry_BNC, sink_H, seen, index_BSK)
  if jax.sharding.get_abstract_mesh().empty:
    return on_device(*args)
  index_spec = None if index_BSK is None else sh.STREAM
  seen_specs = jax.tree.map(lambda _: sh.TOKENS, seen)
  specs = (sh.HEADS, sh.STREAM, sh.STREAM, sh.PER_HEAD, seen_specs, index_spec)
  return jax.shard_map(
    on_device, in_specs=specs, out_specs=(sh.HEADS, P(*sh.HEADS[:3])),
    check_vma=False,  # kernels carry no such types
  )(*args)  # fmt: skip


def chosen_mass(
  q_BSHC: jax.Array,
  entry_BNC: jax.Array,
  lse_BSH: jax.Array,
  seen: Spans,
  index_BSK: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """The attention that each slot's entry got, summed over heads, float32; 0 in unused slots.

  Passes no gradient. For what the indexer learns from.

  Args:
    lse_BSH: as `compressed_attention` returned it.
  """
  args = jax.lax.stop_gradient((q_BSHC, entry_BNC, lse_BSH, seen, index_BSK))
  if unsupported(q_BSHC, entry_BNC, index_BSK):
    return reference.chosen_mass(*args[:3], index_BSK, seen.entry_count_BS, scale=scale)

  def on_device(*args):
    return jax.lax.psum(mosaic.mass(*args, scale=scale), sh.MODEL)

  if jax.sharding.get_abstract_mesh().empty:
    return mosaic.mass(*args, scale=scale)
  seen_specs = jax.tree.map(lambda _: sh.TOKENS, seen)
  specs = (sh.HEADS, sh.STREAM, P(*sh.HEADS[:3]), seen_specs, sh.STREAM)
  return jax.shard_map(on_device, in_specs=specs, out_specs=sh.STREAM, check_vma=False)(*args)
