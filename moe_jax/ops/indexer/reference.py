"""The definition of the lightning indexer: its scores, its choice, and what it learns from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# B batch  S queries  T keys  H main heads  C main key width  J index heads  I index width


def index_scores(
  q_BSJI: Float[Array, 'B S J I'], k_BTI: Float[Array, 'B T I'], weight_BSJ: Float[Array, 'B S J']
) -> Float[Array, 'B S T']:
  """sum_j weight_j relu(q_j . k) / sqrt(I), in float32; later keys are scored too.

  Source: arXiv:2512.02556, equation 1. Released kernels turn q and k by a Hadamard matrix first,
  which changes no product, and round them to FP8.
  """
  dot_BSTJ = jnp.einsum('bsji,bti->bstj', q_BSJI, k_BTI, preferred_element_type=jnp.float32)
  weighted_BSTJ = jax.nn.relu(dot_BSTJ) * weight_BSJ.astype(jnp.float32)[:, :, None]
  return weighted_BSTJ.sum(-1) * q_BSJI.shape[-1] ** -0.5


def top_k_mask(
  score: Float[Array, '... T'], allowed: Bool[Array, '... T'], *, k: int
) -> Bool[Array, '... T']:
  """Marks the k highest-scored of the allowed places, all of them where there are fewer.

  Exact; of equal scores (0 and -0 are) the earliest places win. Passes no gradient.
  """
  if k >= score.shape[-1]:
    return allowed
  score = jnp.where(allowed, jax.lax.stop_gradient(score), -jnp.inf)
  last = jax.lax.top_k(score, k)[0][..., -1:]
  above, equal = score > last, score == last
  room = k - above.sum(-1, keepdims=True)
  return allowed & (above | (equal & (jnp.cumsum(equal, axis=-1) <= room)))


def attention_target(
  q_BSHC: Float[Array, 'B S H C'],
  k_BTHC: Float[Array, 'B T H C'],
  mask_BST: Bool[Array, 'B S T'],
  *,
  scale: float,
) -> Float[Array, 'B S T']:
  """Mean over heads of the main attention's probabilities: what the indexer should agree with.

  A row sums to 1 over its mask, so this is the sum over heads, L1-normalised. Passes no gradient.
  Source: arXiv:2512.02556, section 2.1.
  """
  q_BSHC, k_BTHC = jax.lax.stop_gradient((q_BSHC, k_BTHC))
  score_BHST = jnp.einsum('bshc,bthc->bhst', q_BSHC, k_BTHC, preferred_element_type=jnp.float32)
  p_BHST = jax.nn.softmax(jnp.where(mask_BST[:, None], score_BHST * scale, -1e30), axis=-1)
  return p_BHST.mean(1)


def index_loss(
  target_BST: Float[Array, 'B S T'],
  score_BST: Float[Array, 'B S T'],
  mask_BST: Bool[Array, 'B S T'],
  valid_BS: Bool[Array, 'B S'],
) -> Float[Array, '']:
  """KL(target || softmax(score)) over the masked keys, mean over valid queries.

  Args:
    mask_BST: visible keys in the dense warm-up, the selected ones in sparse training. Every query
      has at least one.
    valid_BS: queries that count; padding does not.

  The source sums over queries and leaves the weight open; the mean does not depend on length.
  Source: arXiv:2512.02556, equations 3 and 4.
  """
  log_q_BST = jax.nn.log_softmax(jnp.where(mask_BST, score_BST, -1e30), axis=-1)
  kl_BST = jax.scipy.special.xlogy(target_BST, target_BST) - target_BST * log_q_BST
  kl_BS = jnp.where(mask_BST, kl_BST, 0).sum(-1)
  return jnp.where(valid_BS, kl_BS, 0).sum() / jnp.maximum(valid_BS.sum(), 1)
