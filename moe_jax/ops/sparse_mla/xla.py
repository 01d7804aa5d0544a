"""Sparse MLA without a kernel: gathered latents, some queries at a time, forward and backward.

Memory is that of one chunk: its latents [C, K, V] and its scores [C, H, K]. The chunk's latents go
through device memory and the scores too, which is what bounds it. The gradient of the latents is a
scatter-add, which on a GPU sums in any order.
"""

import jax
import jax.numpy as jnp

from moe_jax.ops.sparse_mla import reference

# T queries  H heads  V latent (value) width  C rope width  S keys  K slots of a query

_CHUNK_ELEMENTS = 2**25


def chunk_size(num_queries: int, elements_a_query: int) -> int:
  """The largest divisor of the queries that keeps a chunk within 2^25 elements, at least 1."""
  most = max(1, _CHUNK_ELEMENTS // elements_a_query)
  return next(c for c in range(min(most, num_queries), 0, -1) if num_queries % c == 0)


def sparse_mla(
  q_THV: jax.Array,
  q_rope_THC: jax.Array,
  latent_SV: jax.Array,
  rope_SC: jax.Array,
  index_TK: jax.Array,
  count_T: jax.Array,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """As reference.sparse_mla; differentiable."""
  T, H, V = q_THV.shape
  if T == 0:
    return jnp.zeros((0, H, V), q_THV.dtype), jnp.zeros((0, H), jnp.float32)
  size = chunk_size(T, index_TK.shape[1] * (V + rope_SC.shape[1] + H))

  @jax.checkpoint
  def one_chunk(args):
    q, q_rope, index, count = args
    return reference.sparse_mla(q, q_rope, latent_SV, rope_SC, index, count, scale=scale)

  split = lambda a: a.reshape(T // size, size, *a.shape[1:])
  o, lse = jax.lax.map(one_chunk, tuple(map(split, (q_THV, q_rope_THC, index_TK, count_T))))
  return o.reshape(T, H, V), lse.reshape(T, H)


def key_mass(
  q_THV: jax.Array,
  q_rope_THC: jax.Array,
  latent_SV: jax.Array,
  rope_SC: jax.Array,
  index_TK: jax.Array,
  count_T: jax.Array,
  lse_TH: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """As reference.key_mass."""
  (T, H, V), K = q_THV.shape, index_TK.shape[1]
  if T == 0:
    return jnp.zeros((0, K), jnp.float32)
  size = chunk_size(T, K * (V + rope_SC.shape[1] + H))

  def one_chunk(args):
    q, q_rope, index, count, lse = args
    return reference.key_mass(q, q_rope, latent_SV, rope_SC, index, count, lse, scale=scale)

  split = lambda a: a.reshape(T // size, size, *a.shape[1:])
  args = q_THV, q_rope_THC, index_TK, count_T, lse_TH
  return jax.lax.map(one_chunk, tuple(map(split, args))).reshape(T, K)
