"""The definition of attention over the latents that each query names."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# T queries  H heads  V latent (value) width  C rope width  S keys  K slots of a query


def sparse_mla(
  q_THV: Float[Array, 'T H V'],
  q_rope_THC: Float[Array, 'T H C'],
  latent_SV: Float[Array, 'S V'],
  rope_SC: Float[Array, 'S C'],
  index_TK: Int[Array, 'T K'],
  count_T: Int[Array, 'T'],
  *,
  scale: float,
) -> tuple[Float[Array, 'T H V'], Float[Array, 'T H']]:
  """softmax(scale (q latent + q_rope rope)) latent over the first count_T that index_TK names.

  In float32. A query of none gets zeros, and a logsumexp of -1e30.
  """
  score_THK = scale * scores(q_THV, q_rope_THC, latent_SV, rope_SC, index_TK)
  named_T1K = (jnp.arange(index_TK.shape[1]) < count_T[:, None])[:, None]
  any_T11 = (count_T > 0)[:, None, None]
  # where there is none, all, so that no gradient is NaN
  lse_TH1 = jax.nn.logsumexp(score_THK, axis=-1, where=named_T1K | ~any_T11, keepdims=True)
  p_THK = jnp.where(named_T1K, jnp.exp(score_THK - lse_TH1), 0)
  o_THV = jnp.einsum('thk,tkv->thv', p_THK, latent_SV[index_TK].astype(jnp.float32))
  return o_THV.astype(q_THV.dtype), jnp.where(any_T11, lse_TH1, -1e30)[..., 0]


def scores(
  q_THV: Float[Array, 'T H V'],
  q_rope_THC: Float[Array, 'T H C'],
  latent_SV: Float[Array, 'S V'],
  rope_SC: Float[Array, 'S C'],
  index_TK: Int[Array, 'T K'],
) -> Float[Array, 'T H K']:
  wide = lambda a: a.astype(jnp.float32)
  score_THK = jnp.einsum('thv,tkv->thk', wide(q_THV), wide(latent_SV)[index_TK])
  return score_THK + jnp.einsum('thc,tkc->thk', wide(q_rope_THC), wide(rope_SC)[index_TK])


def key_mass(
  q_THV: Float[Array, 'T H V'],
  q_rope_THC: Float[Array, 'T H C'],
  latent_SV: Float[Array, 'S V'],
  rope_SC: Float[Array, 'S C'],
  index_TK: Int[Array, 'T K'],
  count_T: Int[Array, 'T'],
  lse_TH: Float[Array, 'T H'],
  *,
  scale: float,
) -> Float[Array, 'T K']:
  """Probabilities of the named latents, summed over heads; zero at and after count_T."""
  score_THK = scale * scores(q_THV, q_rope_THC, latent_SV, rope_SC, index_TK)
  named_T1K = (jnp.arange(index_TK.shape[1]) < count_T[:, None])[:, None]
  return jnp.where(named_T1K, jnp.exp(score_THK - lse_TH[..., None]), 0).sum(1)
