"""The definition of dense causal attention within documents, and of MLA's absorbed form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# B batch  S queries  T keys  H heads  C key width  V value width  R latent width


def visible(
  q_segment_BS: Int[Array, 'B S'],
  k_segment_BT: Int[Array, 'B T'],
  start_B: Int[Array, 'B'],
  *,
  window: int | None = None,
) -> Bool[Array, 'B S T']:
  """Which keys a query may see: those of its own document, no later than itself.

  Query s of row b stands at index start_B[b] + s, key t at index t. Every query sees at least
  itself. With a window it sees at most that many keys, itself among them.
  """
  S, T = q_segment_BS.shape[1], k_segment_BT.shape[1]
  q_index_BS = start_B[:, None] + jnp.arange(S)
  near_BST = jnp.arange(T) <= q_index_BS[..., None]
  if window is not None:
    near_BST &= jnp.arange(T) > q_index_BS[..., None] - window
  return near_BST & (q_segment_BS[..., None] == k_segment_BT[:, None, :])


def _softmax(score_BHST: Array, visible_BST: Array) -> Array:
  return jax.nn.softmax(jnp.where(visible_BST[:, None], score_BHST, -1e30), axis=-1)


def attention(
  q_BSHC: Float[Array, 'B S H C'],
  k_BTHC: Float[Array, 'B T H C'],
  v_BTHV: Float[Array, 'B T H V'],
  visible_BST: Bool[Array, 'B S T'],
  *,
  scale: float,
) -> Float[Array, 'B S H V']:
  """softmax(scale * q k) v over visible keys; float32 scores and softmax, v's dtype out."""
  score_BHST = jnp.einsum('bshc,bthc->bhst', q_BSHC, k_BTHC, preferred_element_type=jnp.float32)
  p_BHST = _softmax(score_BHST * scale, visible_BST).astype(v_BTHV.dtype)
  return jnp.einsum('bhst,bthv->bshv', p_BHST, v_BTHV)


def attention_and_lse(
  q_BSHC: Float[Array, 'B S H C'],
  k_BTGC: Float[Array, 'B T G C'],
  v_BTGV: Float[Array, 'B T G V'],
  visible_BST: Bool[Array, 'B S T'],
  sink_H: Float[Array, 'H'] | None = None,
  *,
  scale: float,
) -> tuple[Float[Array, 'B S H V'], Float[Array, 'B H S']]:
  """`attention`, also with fewer key heads than query heads, and with sinks.

  A group of H / G query heads shares a key head. A sink is a score of no key: it takes part in the
  softmax and contributes nothing. Returns also the float32 logarithm of each row's sum.
  """
  H, G = q_BSHC.shape[2], k_BTGC.shape[2]
  k_BTHC, v_BTHV = (a if G == H else jnp.repeat(a, H // G, axis=2) for a in (k_BTGC, v_BTGV))
  score_BHST = jnp.einsum('bshc,bthc->bhst', q_BSHC, k_BTHC, preferred_element_type=jnp.float32)
  score_BHST = jnp.where(visible_BST[:, None], score_BHST * scale, -1e30)
  lse_BHS = jax.nn.logsumexp(score_BHST, axis=-1)
  if sink_H is not None:
    lse_BHS = jnp.logaddexp(lse_BHS, sink_H[:, None].astype(jnp.float32))
  p_BHST = jnp.exp(score_BHST - lse_BHS[..., None]).astype(v_BTGV.dtype)
  return jnp.einsum('bhst,bthv->bshv', p_BHST, v_BTHV), lse_BHS


def latent_attention(
  q_BSHR: Float[Array, 'B S H R'],
  q_rope_BSHC: Float[Array, 'B S H C'],
  latent_BTR: Float[Array, 'B T R'],
  rope_BTC: Float[Array, 'B T C'],
  visible_BST: Bool[Array, 'B S T'],
  *,
  scale: float,
) -> Float[Array, 'B S H R']:
  """MLA on its latents: queries already multiplied by the key up-projection, one key for all heads.

  Source: arXiv:2405.04434, section 2.1 (the absorbed form, exact).
  """
  score_BHST = jnp.einsum(
    'bshr,btr->bhst', q_BSHR, latent_BTR, preferred_element_type=jnp.float32
  ) + jnp.einsum('bshc,btc->bhst', q_rope_BSHC, rope_BTC, preferred_element_type=jnp.float32)
  p_BHST = _softmax(score_BHST * scale, visible_BST).astype(latent_BTR.dtype)
  return jnp.einsum('bhst,btr->bshr', p_BHST, latent_BTR)
