"""The definition of V4's indexer. Source: arXiv:2606.19348, section 2.2; arXiv:2512.02556."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# B batch  S queries  N compressed entries  H indexer heads  C indexer width


def entry_scores(
  q_BSHC: Float[Array, 'B S H C'], k_BNC: Float[Array, 'B N C'], weight_BSH: Float[Array, 'B S H']
) -> Float[Array, 'B S N']:
  """sum_h w_h relu(q_h k) / sqrt(H C), float32."""
  H, C = q_BSHC.shape[2:]
  dot_BSHN = jnp.einsum('bshc,bnc->bshn', q_BSHC, k_BNC, preferred_element_type=jnp.float32)
  weight_BSH = weight_BSH.astype(jnp.float32) * H**-0.5
  return (jax.nn.relu(dot_BSHN) * C**-0.5 * weight_BSH[..., None]).sum(2)


def select_top_k(
  score_BSN: Float[Array, 'B S N'], visible_BSN: Bool[Array, 'B S N'], *, k: int
) -> Bool[Array, 'B S N']:
  """The k visible entries of the largest scores, or all where there are no more; of equals, the
  first.
  """
  if k >= score_BSN.shape[-1]:
    return visible_BSN
  score_BSN = jax.lax.stop_gradient(jnp.where(visible_BSN, score_BSN, -jnp.inf))
  least_BS1 = jax.lax.top_k(score_BSN, k)[0][..., -1:]
  above_BSN, equal_BSN = score_BSN > least_BS1, score_BSN == least_BS1
  room_BS1 = k - above_BSN.sum(-1, keepdims=True)
  return visible_BSN & (above_BSN | (equal_BSN & (jnp.cumsum(equal_BSN, axis=-1) <= room_BS1)))


def index_loss(
  score_BSN: Float[Array, 'B S N'],
  mass_BSN: Float[Array, 'B S N'],
  selected_BSN: Bool[Array, 'B S N'],
  valid_BS: Bool[Array, 'B S'],
) -> Float[Array, '']:
  """KL(p || softmax(score)) over the selected entries, a mean over the valid tokens that have any.

  p is the attention that the model's own heads paid to these entries, summed over heads and scaled
  to sum to one; it carries no gradient. V4's loss is not published: this is equation 4 of
  arXiv:2512.02556 read with compressed entries for keys. Chosen here: p leaves out what went to the
  window and the sink and is normalised on the selected set, tokens are averaged rather than summed,
  and with all visible entries selected it is that paper's warm-up loss, equation 3.
  """
  mass_BSN = jax.lax.stop_gradient(jnp.where(selected_BSN, mass_BSN, 0))
  p_BSN = mass_BSN / jnp.maximum(mass_BSN.sum(-1, keepdims=True), 1e-20)
  log_q_BSN = jax.nn.log_softmax(jnp.where(selected_BSN, score_BSN, -1e30), axis=-1)
  entropy_BSN = jax.scipy.special.xlogy(p_BSN, p_BSN)
  kl_BS = (entropy_BSN - jnp.where(selected_BSN, p_BSN * log_q_BSN, 0)).sum(-1)
  counted_BS = valid_BS & selected_BSN.any(-1)
  return jnp.where(counted_BS, kl_BS, 0).sum() / jnp.maximum(counted_BS.sum(), 1)
