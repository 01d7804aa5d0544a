"""Native sparse attention: compressed blocks, chosen blocks and a window, mixed by gates.

`attention` makes scores of all pairs, under masks, and is the definition; `rows_attention` is the
same of whole rows by kernels, forward and backward, in memory linear in the row.
"""

import jax
from jax import P

from moe_jax import sharding as sh
from moe_jax.ops.nsa import fused
from moe_jax.ops.nsa.fused import block_tokens, closed_blocks, unsupported
from moe_jax.ops.nsa.reference import (
  KeyValue,
  Sizes,
  attention,
  block_ends,
  compress,
  compress_blocks,
  select_blocks,
)

__all__ = [
  'KeyValue',
  'Sizes',
  'attention',
  'block_ends',
  'block_tokens',
  'closed_blocks',
  'compress',
  'compress_blocks',
  'rows_attention',
  'select_blocks',
  'unsupported',
]


def rows_attention(
  q_BSGMC: jax.Array,
  compressed: KeyValue,
  selected: KeyValue,
  window: KeyValue,
  gate_BSGM3: jax.Array,
  position_BS: jax.Array,
  segment_BS: jax.Array,
  *,
  sizes: Sizes,
  scale: float,
) -> jax.Array:
  """`attention` of whole rows, where `unsupported` has nothing to say. Deterministic.

  Args:
    compressed: keys and values [B, N, G, C] of the blocks that `closed_blocks` lists.
    gate_BSGM3: not negative.
    position_BS: within the document, without gaps; 0 on padding, which is segment 0.
  """

  def on_device(*args):
    return fused.attention(*args, sizes=sizes, scale=scale)

  args = q_BSGMC, compressed, selected, window, gate_BSGM3, position_BS, segment_BS
  if jax.sharding.get_abstract_mesh().empty:
    return on_device(*args)
  heads = P(*sh.HEADS, None)
  pair = KeyValue(sh.HEADS, sh.HEADS)  # pyright: ignore[reportArgumentType]
  specs = (heads, pair, pair, pair, heads, sh.TOKENS, sh.TOKENS)
  return jax.shard_map(on_device, in_specs=specs, out_specs=heads, check_vma=False)(*args)
