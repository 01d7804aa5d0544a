"""Triton kernels: attention of a group's heads over the blocks of tokens that a query chose.

A program takes two neighbouring queries and a group, one block of 64 keys that either chose at a
time, and each block once. Keys are the rows of both products and the queries' heads their columns,
so that the tensor cores run although a query has only 16 heads.

Traffic: two queries read the blocks that they chose from L2, 32 kB a block for 64 * 16 * 512
operations a query: 16 a byte, so an L2 that delivers 7 TB/s allows 110 TFLOP/s, and what both chose
(the first block, their own and the one before, whatever they score) counts twice.
"""

# T queries  G key-value heads  M query heads of each  C width  K chosen blocks
# N programs' queries  L blocks that a program's queries chose

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton
from moe_jax.ops.nsa.triton_runs import LOG2E, NO_SCORE, load_rows, store_rows

# neighbouring queries of a program
_TOGETHER = 2


def forward(
  q_TGMC: jax.Array,
  k_TGC: jax.Array,
  v_TGC: jax.Array,
  start_TGK: jax.Array,
  count_T: jax.Array,
  *,
  length: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Outputs like q and their base-2 logsumexp [T, G, M].

  Args:
    start_TGK: first token of each chosen block, all of the query's document and no later than it;
      a query sees a block's tokens up to itself. Every query has one at least.
    count_T: how many of them count.
  """
  T, G, M, C = q_TGMC.shape
  tile = _Tile(start_TGK, count_T, M)

  def kernel(q_g, k_g, v_g, chosen_g, count_g, o_g, lse_g):
    at, group = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
    query, row, live = tile.heads(at, group)
    q = load_rows(q_g, row, C)

    def block(i, carry):
      acc, top, total = carry
      key_row, seen = tile.block(chosen_g, at, group, i, query, length)
      k, v = load_rows(k_g, key_row, C), load_rows(v_g, key_row, C)
      s = plt.dot(k, q, trans_b=True) * (scale * LOG2E)
      s = jnp.where(seen, s, NO_SCORE)
      new_top = jnp.maximum(top, s.max(axis=0))
      rescale = jnp.exp2(top - new_top)
      # a query that has not seen a key yet
      p = jnp.where(seen, jnp.exp2(s - new_top[None, :]), 0.0)
      acc = acc * rescale[None, :] + plt.dot(v, p.astype(v.dtype), trans_a=True)
      return acc, new_top, total * rescale + p.sum(axis=0)

    zero = jnp.zeros((tile.columns,), jnp.float32)
    carry = jnp.zeros((C, tile.columns), jnp.float32), zero + NO_SCORE, zero
    acc, top, total = lax.fori_loop(0, count_g[at * G + group], block, carry)
    total = jnp.where(live, total, 1.0)
    store_rows(o_g, row, (acc / total[None, :]).T, live)
    store_rows(lse_g, row, top + jnp.log2(total), live)

  flat, like = lambda a: a.reshape(-1, a.shape[-1]), jax.ShapeDtypeStruct
  o, lse = pallas_triton.call(
    kernel, flat(q_TGMC), flat(k_TGC), flat(v_TGC), *tile.chosen,
    grid=(tile.number, G),
    out=(like((T * G * M, C), q_TGMC.dtype), like((T * G * M,), jnp.float32)),
    num_warps=4, num_stages=3,
  )  # fmt: skip
  return o.reshape(q_TGMC.shape), lse.reshape(T, G, M)


def query_gradient(
  q_TGMC: jax.Array,
  do_TGMC: jax.Array,
  k_TGC: jax.Array,
  v_TGC: jax.Array,
  start_TGK: jax.Array,
  count_T: jax.Array,
  lse_TGM: jax.Array,
  delta_TGM: jax.Array,
  *,
  length: int,
  scale: float,
) -> jax.Array:
  T, G, M, C = q_TGMC.shape
  tile = _Tile(start_TGK, count_T, M)

  def kernel(q_g, do_g, k_g, v_g, chosen_g, count_g, lse_g, delta_g, dq_g):
    at, group = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
    query, row, live = tile.heads(at, group)
    q, do = load_rows(q_g, row, C), load_rows(do_g, row, C)
    lse, delta = plt.load(lse_g.at[row]), plt.load(delta_g.at[row])

    def block(i, dq):
      key_row, seen = tile.block(chosen_g, at, group, i, query, length)
      k, v = load_rows(k_g, key_row, C), load_rows(v_g, key_row, C)
      s = plt.dot(k, q, trans_b=True) * (scale * LOG2E)
      p = jnp.where(seen, jnp.exp2(s - lse[None, :]), 0.0)
      ds = p * (plt.dot(v, do, trans_b=True) - delta[None, :]) * scale
      return dq + plt.dot(k, ds.astype(k.dtype), trans_a=True)

    zeros = jnp.zeros((C, tile.columns), jnp.float32)
    dq = lax.fori_loop(0, count_g[at * G + group], block, zeros)
    store_rows(dq_g, row, dq.T, live)

  flat = lambda a: a.reshape(-1, a.shape[-1])
  dq = pallas_triton.call(
    kernel, flat(q_TGMC), flat(do_TGMC), flat(k_TGC), flat(v_TGC), *tile.chosen,
    lse_TGM.reshape(-1), delta_TGM.reshape(-1),
    grid=(tile.number, G), out=jax.ShapeDtypeStruct((T * G * M, C), q_TGMC.dtype),
    num_warps=4, num_stages=3,
  )  # fmt: skip
  return dq.reshape(q_TGMC.shape)


class _Tile:
  """The columns of a program: heads of a group, of a few neighbouring queries; and their blocks."""

  def __init__(self, start_TGK: jax.Array, count_T: jax.Array, M: int):
    self.T, self.G, self.K = start_TGK.shape
    self.M, self.heads_of = M, max(M, 16)
    self.columns, self.number = _TOGETHER * self.heads_of, pl.cdiv(self.T, _TOGETHER)
    chosen_NGL, count_NG = _chosen_by_any(start_TGK, count_T, _TOGETHER)
    self.chosen = chosen_NGL.reshape(-1), count_NG.reshape(-1)

  def heads(self, at, group):
    """Each column's query, its head's row, and whether there is one."""
    column = jnp.arange(self.columns, dtype=jnp.int32)
    query, head = at * _TOGETHER + column // self.heads_of, column % self.heads_of
    live = (head < self.M) & (query < self.T)
    query = jnp.minimum(query, self.T - 1)
    return query, (query * self.G + group) * self.M + jnp.minimum(head, self.M - 1), live

  def block(self, chosen_g, at, group, i, query, length: int):
    """Rows of the i-th block's tokens, and which of them each column sees, [length, columns]."""
    entry = chosen_g[(at * self.G + group) * _TOGETHER * self.K + i]
    key = (entry >> _TOGETHER) + jnp.arange(length, dtype=jnp.int32)
    takes = (entry >> (query - at * _TOGETHER)) & 1
    seen = (key[:, None] <= query[None, :]) & (takes == 1)[None, :]
    # behind the last of these queries nothing is read
    return jnp.minimum(key, query.max()) * self.G + group, seen


def _chosen_by_any(
  start_TGK: jax.Array, count_T: jax.Array, together: int
) -> tuple[jax.Array, jax.Array]:
  """The blocks that any of `together` neighbouring queries chose, each once, [N, G, L], and how
  many. A block is its first token, and then a bit for each of the queries, the first the lowest."""
  T, G, K = start_TGK.shape
  N = pl.cdiv(T, together)
  padded = lambda a: jnp.pad(a, ((0, N * together - T), *((0, 0),) * (a.ndim - 1)))
  start_NGL = padded(start_TGK).reshape(N, together, G, K).swapaxes(1, 2).reshape(N, G, -1)
  count_NQ1 = padded(count_T).reshape(N, together, 1)
  used_NGL = jnp.broadcast_to((jnp.arange(K) < count_NQ1).reshape(N, 1, -1), start_NGL.shape)
  slot_L = jnp.arange(together * K)
  # unused slots equal none
  start_NGL = jnp.where(used_NGL, start_NGL, -1 - slot_L)
  same_NGLL = start_NGL[..., :, None] == start_NGL[..., None, :]
  new_NGL = used_NGL & ~(same_NGLL & (slot_L < slot_L[:, None])).any(-1)
  takes_NGLQ = same_NGLL.reshape(N, G, together * K, together, K).any(-1)
  bits_NGL = (takes_NGLQ << jnp.arange(together)).sum(-1)
  place_NGL = jnp.where(new_NGL, jnp.cumsum(new_NGL, axis=-1) - 1, -1)
  entry_NGL = (start_NGL << together) + bits_NGL
  moved_NGLL = jnp.where(place_NGL[..., None] == slot_L, entry_NGL[..., None], 0)
  return moved_NGLL.sum(2).astype(jnp.int32), new_NGL.sum(-1).astype(jnp.int32)
