"""The definition of mixture of block attention: which blocks a query routes itself to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.ops.attention.grouped import grouped_probabilities, weighted_values
from moe_jax.ops.blocks import Span, first_of_block, whole_blocks
from moe_jax.ops.indexer import top_k_mask

# B batch  S queries  T keys  G key-value heads  M query heads of each  C key width  V value width


def routed(
  q_BSGMC: Float[Array, 'B S G M C'],
  k_BTGC: Float[Array, 'B T G C'],
  span: Span,
  *,
  block: int,
  top_k: int,
) -> Bool[Array, 'B G M S T']:
  """Which keys each query head attends to, up to the query itself: its own block, and the `top_k`
  earlier blocks of its document whose mean key it agrees with most.

  `top_k` does not count the query's own block; the paper's own code counts it. Of equal scores the
  earliest win. Passes no gradient. Source: arXiv:2502.13189, section 2.2.
  """
  q_BSGMC, k_BTGC = jax.lax.stop_gradient((q_BSGMC, k_BTGC))
  same_BTT, behind_BST = span.same_block(block), span.blocks_behind(block)
  visible_BST = span.visible()
  share_BTT = same_BTT / same_BTT.sum(-1, keepdims=True)
  # an earlier block is whole, so its mean is over all of its tokens
  mean_BTGC = jnp.einsum('but,btgc->bugc', share_BTT, k_BTGC.astype(jnp.float32))
  score_BGMST = jnp.einsum('bsgmc,btgc->bgmst', q_BSGMC.astype(jnp.float32), mean_BTGC)
  earlier_BST = visible_BST & first_of_block(same_BTT)[:, None] & (behind_BST > 0)
  chosen_BGMST = top_k_mask(score_BGMST, earlier_BST[:, None, None], k=top_k)
  own_BST = visible_BST & (behind_BST == 0)
  keys_BGMST = whole_blocks(chosen_BGMST, same_BTT) & visible_BST[:, None, None]
  return keys_BGMST | own_BST[:, None, None]


def attention(
  q_BSGMC: Float[Array, 'B S G M C'],
  k_BTGC: Float[Array, 'B T G C'],
  v_BTGV: Float[Array, 'B T G V'],
  span: Span,
  *,
  block: int,
  top_k: int,
  scale: float,
) -> Float[Array, 'B S G M V']:
  """One softmax over the union of the routed blocks. Source: arXiv:2502.13189, section 2.2."""
  mask_BGMST = routed(q_BSGMC, k_BTGC, span, block=block, top_k=top_k)
  p_BGMST = grouped_probabilities(q_BSGMC, k_BTGC, mask_BGMST, scale=scale)
  return weighted_values(p_BGMST, v_BTGV)
