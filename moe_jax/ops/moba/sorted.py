"""Mixture of block attention on whole rows, in memory linear in the row.

A query's own block is dense attention within blocks. For the others, pairs of a query head and a
block that it chose are sorted by block: then the keys of a pair are a run that begins no earlier
than the run before, which NSA's kernels for runs take, forward and backward; a block's keys are
read once for 128 pairs. The softmaxes of a query are put together by their logsumexp.

Traffic: for each pair a query, an output and in between their sorted copies.
"""

# B batch  S tokens  G key-value heads  M query heads of each  C width  N whole blocks of a row
# K chosen blocks of a query  P pairs of a key-value head (S*M*K)  H = G*M

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.ops.attention import attention_and_lse
from moe_jax.ops.nsa import runs

# of scores held at a time
_CHUNK_BYTES = 1 << 28
_NONE = -1e30


def unsupported(q_BSGMC: jax.Array, v_width: int, block: int) -> str | None:
  """Why these kernels cannot run here, in one line, or None if they can."""
  S, C = q_BSGMC.shape[1], q_BSGMC.shape[-1]
  if problem := runs.unsupported(C, v_width):
    return problem
  if q_BSGMC.dtype != jnp.bfloat16:
    return f'needs bfloat16, got {q_BSGMC.dtype}'
  if block >= S:
    return f'needs rows longer than a block of {block}, got {S}'
  return None


def attention(
  q_BSGMC: Float[Array, 'B S G M C'],
  k_BSGC: Float[Array, 'B S G C'],
  v_BSGC: Float[Array, 'B S G C'],
  position_BS: Int[Array, 'B S'],
  segment_BS: Int[Array, 'B S'],
  *,
  block: int,
  top_k: int,
  scale: float,
) -> Float[Array, 'B S G M C']:
  """As reference.attention without a cache, on one device.

  Args:
    position_BS: within the document, without gaps; 0 on padding, which is segment 0.
  """
  B, S, G, M, C = q_BSGMC.shape
  own_BS = jnp.cumsum(position_BS % block == 0, axis=1, dtype=jnp.int32)
  start_B = jnp.zeros_like(position_BS[:, 0])
  o_BSHC, lse_BHS = attention_and_lse(
    q_BSGMC.reshape(B, S, G * M, C), k_BSGC, v_BSGC, own_BS, own_BS, start_B, scale=scale
  )
  own = o_BSHC.reshape(q_BSGMC.shape), jnp.swapaxes(lse_BHS, 1, 2).reshape(B, S, G, M)
  K = min(top_k, S // block)
  if not K:
    return own[0]
  first_BGSMK = _choose(
    *lax.stop_gradient((q_BSGMC, k_BSGC)), position_BS, segment_BS, block=block, k=K
  )
  o_BSGMKC, lse_BSGMK = _over_pairs(q_BSGMC, k_BSGC, v_BSGC, first_BGSMK, block=block, scale=scale)
  lse_BSGML = jnp.concatenate([own[1][..., None], lse_BSGMK], axis=-1)
  weight_BSGML = jax.nn.softmax(lse_BSGML, axis=-1)[..., None]
  mixed = weight_BSGML[..., 0, :] * own[0].astype(jnp.float32)
  mixed += (weight_BSGML[..., 1:, :] * o_BSGMKC.astype(jnp.float32)).sum(-2)
  return mixed.astype(q_BSGMC.dtype)


def _choose(q_BSGMC, k_BSGC, position_BS, segment_BS, *, block: int, k: int) -> jax.Array:
  """First token of each chosen block, S where there are fewer: [B, G, S, M, k]."""
  B, S, G, M = q_BSGMC.shape[:4]
  num = S // block
  # a block that a later query may choose is whole
  closes_BS = (segment_BS > 0) & ((position_BS + 1) % block == 0)
  end_BN = jax.vmap(lambda a: jnp.nonzero(a, size=num, fill_value=S - 1)[0])(closes_BS)
  start_BN = jnp.maximum(end_BN - block + 1, 0).astype(jnp.int32)
  at_BNL = start_BN[..., None] + jnp.arange(block)
  mean_BNGC = jax.vmap(lambda k_SGC, at: k_SGC[at].astype(jnp.float32).mean(1))(k_BSGC, at_BNL)
  # blocks of the query's document before its own: a run of the row's
  count_BS = jnp.where(segment_BS > 0, position_BS // block, 0)
  closed_BS = jnp.cumsum(closes_BS, axis=1, dtype=jnp.int32)
  first_BS = closed_BS - jnp.where(segment_BS > 0, (position_BS + 1) // block, 0)
  queries = max(1, min(S, _CHUNK_BYTES // (4 * B * G * M * num)))
  chunks = -(-S // queries)

  def chunk(start):
    cut = lambda a: lax.dynamic_slice_in_dim(a, start, queries, axis=1)
    q_BQGMC, first_BQ, count_BQ = (cut(a) for a in padded)
    score_BGQMN = jnp.einsum(
      'bqgmc,bngc->bgqmn', q_BQGMC.astype(jnp.float32), mean_BNGC, precision='highest'
    )
    behind_BQN = jnp.arange(num) - first_BQ[..., None]
    mine_BQN = (behind_BQN >= 0) & (behind_BQN < count_BQ[..., None])
    score_BGQMN = jnp.where(mine_BQN[:, None, :, None], score_BGQMN, -jnp.inf)
    firsts = []
    # XLA's top_k sorts whole rows
    for _ in range(k):
      n_BGQM = jnp.argmax(score_BGQMN, axis=-1)
      some_BGQM = score_BGQMN.max(-1) > -jnp.inf
      first_BGQM = jax.vmap(lambda start_N, n: start_N[n])(start_BN, n_BGQM)
      firsts.append(jnp.where(some_BGQM, first_BGQM, S))
      score_BGQMN = jnp.where(jnp.arange(num) == n_BGQM[..., None], -jnp.inf, score_BGQMN)
    return jnp.stack(firsts, axis=-1)

  pad = lambda a: jnp.pad(a, ((0, 0), (0, chunks * queries - S)) + ((0, 0),) * (a.ndim - 2))
  padded = tuple(pad(a) for a in (q_BSGMC, first_BS, count_BS))
  first_ZBGQMK = lax.map(chunk, jnp.arange(chunks, dtype=jnp.int32) * queries)
  return jnp.moveaxis(first_ZBGQMK, 0, 2).reshape(B, G, chunks * queries, M, k)[:, :, :S]


def _over_pairs(
  q_BSGMC, k_BSGC, v_BSGC, first_BGSMK, *, block: int, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Outputs [B, S, G, M, K, C] and natural logsumexp of each query's chosen blocks."""
  (B, S, G, M, C), K = q_BSGMC.shape, first_BGSMK.shape[-1]
  P = S * M * K
  row_R1 = jnp.arange(B * G, dtype=jnp.int32)[:, None]
  # one sort of all rows, of which a later one has larger keys
  key_X = (first_BGSMK.reshape(B * G, P) + row_R1 * (S + 1)).reshape(-1)
  pair_X = jnp.arange(key_X.size, dtype=jnp.int32)
  key_X, order_X = lax.sort((key_X, pair_X), num_keys=1, is_stable=True)
  place_X = jnp.zeros_like(order_X).at[order_X].set(pair_X, unique_indices=True)
  first_RP = key_X.reshape(B * G, P) - row_R1 * (S + 1)
  order_RP, place_RP = (a.reshape(B * G, P) - row_R1 * P for a in (order_X, place_X))
  rows = lambda a: jnp.swapaxes(a, 1, 2).reshape(B * G, S, 1, C)
  q_RSMC = jnp.swapaxes(q_BSGMC, 1, 2).reshape(B * G, S * M, C)
  q_RPC = jax.vmap(_sorted)(q_RSMC, order_RP, place_RP)
  count_RP = jnp.where(first_RP < S, block, 0)
  out: Any = runs.attention(
    scale, q_RPC[:, :, None, None], rows(k_BSGC), rows(v_BSGC), first_RP, count_RP
  )
  o_RP11C, lse_RP11 = out
  o_RPC = jax.vmap(_permuted)(o_RP11C[:, :, 0, 0], place_RP, order_RP)
  lse_RP = jax.vmap(_permuted)(lse_RP11, place_RP, order_RP)[:, :, 0, 0]
  back = lambda a: jnp.swapaxes(a.reshape(B, G, S, M, K, *a.shape[2:]), 1, 2)
  return back(o_RPC), jnp.maximum(back(lse_RP) * math.log(2), _NONE)


@jax.custom_vjp
def _permuted(x_PC, at_P, back_P):
  """x[at], where `back` is the inverse of the permutation `at`."""
  del back_P
  return x_PC[at_P]


_permuted.defvjp(
  lambda x, at, back: (x[at], back), lambda back, dx: (dx[back], None, None)
)  # fmt: skip


@jax.custom_vjp
def _sorted(x_TC, order_P, place_P):
  """Rows in the order of the pairs, of which every row has as many, one after the other."""
  return x_TC[order_P // (order_P.size // x_TC.shape[0])]


def _sorted_forward(x_TC, order_P, place_P):
  return _sorted(x_TC, order_P, place_P), (jnp.zeros((x_TC.shape[0], 0)), place_P)


def _sorted_backward(kept, dx_PC):
  like, place_P = kept
  parts_TKC = dx_PC[place_P].reshape(like.shape[0], -1, dx_PC.shape[-1])
  return parts_TKC.astype(jnp.float32).sum(1).astype(dx_PC.dtype), None, None


_sorted.defvjp(_sorted_forward, _sorted_backward)
