"""Mixture of block attention: a query attends to its own block and those it agrees with most.

`attention` makes scores of all pairs, under masks, and is the definition; `rows_attention` is the
same of whole rows by kernels, forward and backward, in memory linear in the row.
"""

import jax
from jax import P

from moe_jax import sharding as sh
from moe_jax.ops.moba import sorted as by_block
from moe_jax.ops.moba.reference import attention, routed
from moe_jax.ops.moba.sorted import unsupported

__all__ = ['attention', 'routed', 'rows_attention', 'unsupported']


def rows_attention(
  q_BSGMC: jax.Array,
  k_BSGC: jax.Array,
  v_BSGC: jax.Array,
  position_BS: jax.Array,
  segment_BS: jax.Array,
  *,
  block: int,
  top_k: int,
  scale: float,
) -> jax.Array:
  """`attention` of whole rows, where `unsupported` has nothing to say. Deterministic.

  Args:
    position_BS: within the document, without gaps; 0 on padding, which is segment 0.
  """

  def on_device(*args):
    return by_block.attention(*args, block=block, top_k=top_k, scale=scale)

  args = q_BSGMC, k_BSGC, v_BSGC, position_BS, segment_BS
  if jax.sharding.get_abstract_mesh().empty:
    return on_device(*args)
  heads = P(*sh.HEADS, None)
  specs = (heads, sh.HEADS, sh.HEADS, sh.TOKENS, sh.TOKENS)
  return jax.shard_map(on_device, in_specs=specs, out_specs=heads, check_vma=False)(*args)
