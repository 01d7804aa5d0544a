"""A table from token ids to experts, for layers that route without a choice."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# V token ids  K experts a token  E experts  P ids a deal  N deals


def hash_table(key: jax.Array, *, num_ids: int, top_k: int, num_experts: int) -> Int[Array, 'V K']:
  """K distinct experts for every id, the same number of ids for every expert.

  Each deal shuffles the experts and hands them out in turn, K an id, wrapping around, until all
  have been handed out equally often: after P = E / gcd(E, K) ids. Only the last deal may be cut
  short, so the experts' counts differ by at most one.

  Hash routing: arXiv:2106.04426. DeepSeek-V4 (arXiv:2606.19348) routes its first layers so; its
  table is in the checkpoint, and how it was made is not published.
  """
  K, E = top_k, num_experts
  P = E // math.gcd(E, K)
  deals_NE = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), (-(-num_ids // P), E))
  deals_NE = jax.random.permutation(key, deals_NE, axis=1, independent=True)
  id_V1 = jnp.arange(num_ids)[:, None]
  return deals_NE[id_V1 // P, (id_V1 % P * K + jnp.arange(K)) % E]
