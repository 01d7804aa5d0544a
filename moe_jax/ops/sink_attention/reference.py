"""The definition of attention with a sink, and of what a query of V4 may see.

Source: arXiv:2606.19348, section 2.2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# B batch  S queries  T keys  N compressed entries  H heads  C head width


def window_visible(
  q_index_BS: Int[Array, 'B S'],
  k_index_BT: Int[Array, 'B T'],
  q_segment_BS: Int[Array, 'B S'],
  k_segment_BT: Int[Array, 'B T'],
  *,
  window: int,
) -> Bool[Array, 'B S T']:
  """The last `window` tokens of a query's own document, itself included."""
  back_BST = q_index_BS[:, :, None] - k_index_BT[:, None]
  same_BST = q_segment_BS[:, :, None] == k_segment_BT[:, None]
  return same_BST & (back_BST >= 0) & (back_BST < window)


def entries_visible(
  q_index_BS: Int[Array, 'B S'],
  end_BN: Int[Array, 'B N'],
  q_segment_BS: Int[Array, 'B S'],
  segment_BN: Int[Array, 'B N'],
) -> Bool[Array, 'B S N']:
  """The entries of a query's own document whose window closes at the query or before.

  Args:
    end_BN: index of the last token of each entry's window.
    segment_BN: its document, 0 where there is no entry.
  """
  same_BSN = q_segment_BS[:, :, None] == segment_BN[:, None]
  return same_BSN & (segment_BN > 0)[:, None] & (end_BN[:, None] <= q_index_BS[:, :, None])


def sink_attention(
  q_BSHC: Float[Array, 'B S H C'],
  key_BTC: Float[Array, 'B T C'],
  sink_H: Float[Array, 'H'],
  visible_BST: Bool[Array, 'B S T'],
  *,
  scale: float,
) -> tuple[Float[Array, 'B S H C'], Float[Array, 'B S T']]:
  """softmax over the visible keys and the sink, of which the sink's share goes nowhere.

  Float32 scores and softmax, the key's dtype out. Every query sees at least one key.

  Returns:
    The output, and the attention that each key got, float32, summed over heads.
  """
  score_BHST = jnp.einsum('bshc,btc->bhst', q_BSHC, key_BTC, preferred_element_type=jnp.float32)
  score_BHST = jnp.where(visible_BST[:, None], score_BHST * scale, -1e30)
  sink_H11 = sink_H.astype(jnp.float32)[:, None, None]
  most_BHS1 = jax.lax.stop_gradient(jnp.maximum(score_BHST.max(-1, keepdims=True), sink_H11))
  e_BHST = jnp.exp(score_BHST - most_BHS1)
  p_BHST = e_BHST / (e_BHST.sum(-1, keepdims=True) + jnp.exp(sink_H11 - most_BHS1))
  o_BSHC = jnp.einsum('bhst,btc->bshc', p_BHST.astype(key_BTC.dtype), key_BTC)
  return o_BSHC, p_BHST.sum(1)


def logsumexp(
  q_BSHC: Float[Array, 'B S H C'],
  key_BTC: Float[Array, 'B T C'],
  sink_H: Float[Array, 'H'],
  visible_BST: Bool[Array, 'B S T'],
  *,
  scale: float,
) -> Float[Array, 'B S H']:
  """Base-2 logarithm of the softmax's denominator, the sink included."""
  score_BSHT = jnp.einsum('bshc,btc->bsht', q_BSHC, key_BTC, preferred_element_type=jnp.float32)
  score_BSHT = jnp.where(visible_BST[:, :, None], score_BSHT * scale, -jnp.inf)
  lse_BSH = jax.nn.logsumexp(score_BSHT, axis=-1)
  return jnp.logaddexp(lse_BSH, sink_H.astype(jnp.float32)) / jnp.log(2.0)


def chosen_mass(
  q_BSHC: Float[Array, 'B S H C'],
  entry_BNC: Float[Array, 'B N C'],
  lse_BSH: Float[Array, 'B S H'],
  index_BSK: Int[Array, 'B S K'],
  count_BS: Int[Array, 'B S'],
  *,
  scale: float,
) -> Float[Array, 'B S K']:
  """The attention that each slot's entry got, summed over heads; 0 in slots from `count` on."""
  chosen_BSKC = jax.vmap(lambda entry_NC, index_SK: entry_NC[index_SK])(entry_BNC, index_BSK)
  score_BSHK = jnp.einsum(
    'bshc,bskc->bshk', q_BSHC, chosen_BSKC, preferred_element_type=jnp.float32
  )
  p_BSHK = jnp.exp(score_BSHK * scale - lse_BSH[..., None] * jnp.log(2.0))
  used_BSK = jnp.arange(index_BSK.shape[-1]) < count_BS[..., None]
  return jnp.where(used_BSK, p_BSHK.sum(2), 0)
