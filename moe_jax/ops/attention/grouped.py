"""The definition of masked attention where a group of query heads shares a key and value head."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# B batch  S queries  T keys  G key-value heads  M query heads of each  C key width  V value width


def grouped_probabilities(
  q_BSGMC: Float[Array, 'B S G M C'],
  k_BTGC: Float[Array, 'B T G C'],
  mask: Bool[Array, 'B #G #M S T'],
  *,
  scale: float,
) -> Float[Array, 'B G M S T']:
  """softmax(scale * q k) over the masked keys, in float32; zeros for a query without any."""
  score_BGMST = jnp.einsum('bsgmc,btgc->bgmst', q_BSGMC, k_BTGC, preferred_element_type=jnp.float32)
  p_BGMST = jax.nn.softmax(jnp.where(mask, score_BGMST * scale, -1e30), axis=-1)
  return jnp.where(mask, p_BGMST, 0)


def weighted_values(
  p_BGMST: Float[Array, 'B G M S T'], v_BTGV: Float[Array, 'B T G V']
) -> Float[Array, 'B S G M V']:
  return jnp.einsum('bgmst,btgv->bsgmv', p_BGMST.astype(v_BTGV.dtype), v_BTGV)
