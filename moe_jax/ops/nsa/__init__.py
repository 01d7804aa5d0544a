"""Native sparse attention: compressed blocks, chosen blocks and a window, mixed by gates.

The reference is the one implementation: scores of all pairs, under masks.
"""

from moe_jax.ops.nsa.reference import (
  KeyValue,
  Sizes,
  attention,
  block_ends,
  compress,
  select_blocks,
)

__all__ = ['KeyValue', 'Sizes', 'attention', 'block_ends', 'compress', 'select_blocks']
