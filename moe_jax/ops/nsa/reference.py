"""The definition of native sparse attention: compression, selection of blocks, three branches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.ops.attention.grouped import grouped_probabilities, weighted_values
from moe_jax.ops.blocks import Span, block_sums, first_of_block, whole_blocks
from moe_jax.ops.indexer import top_k_mask

# B batch  S queries  T keys  G key-value heads  M query heads of each  C key width  V value width
# L tokens of a compression block  X hidden width

_FIRST, _LOCAL = 1, 2  # blocks taken whatever their score: the document's first, the nearest


class Sizes(NamedTuple):
  """In tokens, but `top_blocks`. `stride` divides `compress_length` and `select_length`."""

  compress_length: int
  stride: int
  select_length: int
  top_blocks: int
  window: int


class KeyValue(NamedTuple):
  k_BTGC: jax.Array
  v_BTGV: jax.Array


def compress(
  x_BTGC: Float[Array, 'B T G C'],
  place_LC: Float[Array, 'L C'],
  up_LCX: Float[Array, 'L C X'],
  down_XC: Float[Array, 'X C'],
) -> Float[Array, 'B T G C']:
  """down silu(up (x + place)) of the L tokens that end at each token.

  Every token gets one, also where the L tokens are of two documents or begin before the row:
  `block_ends` tells which of them are read.
  """
  T, L = x_BTGC.shape[1], place_LC.shape[0]
  before_BTGC = jnp.pad(x_BTGC, ((0, 0), (L - 1, 0), (0, 0), (0, 0)))
  block_BTGLC = jnp.stack([before_BTGC[:, i : i + T] for i in range(L)], axis=3)
  return compress_blocks(block_BTGLC, place_LC, up_LCX, down_XC)


def compress_blocks(
  block_BTGLC: Float[Array, 'B T G L C'],
  place_LC: Float[Array, 'L C'],
  up_LCX: Float[Array, 'L C X'],
  down_XC: Float[Array, 'X C'],
) -> Float[Array, 'B T G C']:
  h_BTGX = jnp.einsum('btglc,lcx->btgx', block_BTGLC + place_LC, up_LCX)
  return jnp.einsum('btgx,xc->btgc', jax.nn.silu(h_BTGX), down_XC)


def block_ends(position_BT: Int[Array, 'B T'], *, length: int, stride: int) -> Bool[Array, 'B T']:
  """Marks the last token of each compression block: tokens [i*stride, i*stride + length) of a
  document, i = 0, 1, ...; the rest of a document shorter than a block stays uncompressed."""
  start_BT = position_BT - (length - 1)
  return (start_BT >= 0) & (start_BT % stride == 0)


def select_blocks(
  p_BGST: Float[Array, 'B G S T'], span: Span, *, sizes: Sizes
) -> Bool[Array, 'B G S T']:
  """Which tokens a group attends to: its `top_blocks` selection blocks, up to the query itself.

  The document's first block and the query's own and the one before are among them always. Of equal
  scores the earliest win. Passes no gradient.

  Args:
    p_BGST: compression attention's probabilities, summed over the group's heads, each at the last
      token of its compression block.

  The source scores block j by the sum over a < l'/d and b < l/d of p[(l'/d) j - a - b]. Taken
  literally that collects compression blocks that begin at or before the selection block. Here the
  index is l'/d - 1 higher: block j then collects each compression block by how much of it lies in
  j, in units of the stride d. Entries out of range count as 0. Source: arXiv:2502.11089, eq. 9.
  """
  index = jnp.arange(p_BGST.shape[-1])
  from_end = index[:, None] - index
  covers_TT = ((from_end >= 0) & (from_end < sizes.compress_length)).astype(jnp.float32)
  mass_BGST = jnp.einsum(
    'bgse,et->bgst', jax.lax.stop_gradient(p_BGST), covers_TT, precision='highest'
  )
  same_BTT, behind_BST = (
    span.same_block(sizes.select_length),
    span.blocks_behind(sizes.select_length),
  )
  score_BGST = block_sums(mass_BGST / sizes.stride, same_BTT)
  forced_BST = (span.k_position_BT // sizes.select_length < _FIRST)[:, None] | (behind_BST < _LOCAL)
  score_BGST = jnp.where(forced_BST[:, None], jnp.inf, score_BGST)
  candidate_BST = span.visible() & first_of_block(same_BTT)[:, None]
  chosen_BGST = top_k_mask(score_BGST, candidate_BST[:, None], k=sizes.top_blocks)
  return whole_blocks(chosen_BGST, same_BTT) & span.visible()[:, None]


def attention(
  q_BSGMC: Float[Array, 'B S G M C'],
  compressed: KeyValue,
  selected: KeyValue,
  window: KeyValue,
  gate_BSGM3: Float[Array, 'B S G M 3'],
  span: Span,
  *,
  sizes: Sizes,
  scale: float,
) -> Float[Array, 'B S G M V']:
  """Sum over the three branches of gate times attention.

  Args:
    compressed: keys and values of compression blocks, each at its last token; others are not read.
      A query sees the blocks that are whole by its own token, and none before the first is.
    selected: raw keys and values, attended to in the blocks that `select_blocks` chooses.
    window: raw keys and values, attended to in the last `sizes.window` tokens, the query included.
    gate_BSGM3: weights of the branches, in this order.

  Source: arXiv:2502.11089, section 3.
  """
  visible_BST = span.visible()
  ends_BT = block_ends(span.k_position_BT, length=sizes.compress_length, stride=sizes.stride)
  near_BST = (span.q_position_BS[..., None] - span.k_position_BT[:, None]) < sizes.window
  whole_BST = visible_BST & ends_BT[:, None]
  p_BGMST = grouped_probabilities(q_BSGMC, compressed.k_BTGC, whole_BST[:, None, None], scale=scale)
  chosen_BGST = select_blocks(p_BGMST.sum(2), span, sizes=sizes)
  outputs = [weighted_values(p_BGMST, compressed.v_BTGV)]
  for branch, mask in (
    (selected, chosen_BGST[:, :, None]),
    (window, (visible_BST & near_BST)[:, None, None]),
  ):
    p_BGMST = grouped_probabilities(q_BSGMC, branch.k_BTGC, mask, scale=scale)
    outputs.append(weighted_values(p_BGMST, branch.v_BTGV))
  compressed_BSGMV, selected_BSGMV, window_BSGMV = (
    gate_BSGM3[..., i, None].astype(o_BSGMV.dtype) * o_BSGMV for i, o_BSGMV in enumerate(outputs)
  )
  return compressed_BSGMV + selected_BSGMV + window_BSGMV
