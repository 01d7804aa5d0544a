"""Blocks of neighbouring tokens, counted within each document, as masks over all pairs of tokens.

A document's blocks start at its own first token, wherever it lies in a packed row, so a block never
holds tokens of two documents, and a document is cut the same way packed or alone.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.ops.attention import visible

# B batch  S queries  T keys


class Span(NamedTuple):
  """Where queries and keys stand; without a cache they are the same tokens.

  Positions count from 0 in each document of a row, without gaps; 0 on padding, which is segment 0.
  """

  q_segment_BS: Array
  q_position_BS: Array
  k_segment_BT: Array
  k_position_BT: Array
  start_B: Array  # index of the first query among the keys

  def visible(self) -> Bool[Array, 'B S T']:
    return visible(self.q_segment_BS, self.k_segment_BT, self.start_B)

  def blocks_behind(self, size: int) -> Array:
    """int32 [B, S, T]: how many blocks a key's block lies before its query's, in one document."""
    return self.q_position_BS[..., None] // size - self.k_position_BT[:, None, :] // size

  def same_block(self, size: int) -> Bool[Array, 'B T T']:
    """Pairs of keys in one block of one document."""
    segment, block = self.k_segment_BT, self.k_position_BT // size
    return (segment[:, None] == segment[..., None]) & (block[:, None] == block[..., None])


def first_of_block(same_BTT: Bool[Array, 'B T T']) -> Bool[Array, 'B T']:
  """One token for each block: its first in the row."""
  return jnp.argmax(same_BTT, axis=-1) == jnp.arange(same_BTT.shape[-1])


def whole_blocks(
  chosen: Bool[Array, 'B ... T'], same_BTT: Bool[Array, 'B T T']
) -> Bool[Array, 'B ... T']:
  """Marks all tokens of every block of which one is marked."""
  return block_sums(chosen.astype(jnp.float32), same_BTT) > 0


def block_sums(
  values: Float[Array, 'B ... T'], same_BTT: Bool[Array, 'B T T']
) -> Float[Array, 'B ... T']:
  """At every token, the sum of the values over its block, in float32."""
  return jnp.einsum('b...t,btu->b...u', values, same_BTT.astype(jnp.float32), precision='highest')
