"""Triton kernels: attention of a group's heads over the blocks of tokens that a query chose.

A program of a single warp per query and group, one block of 64 keys at a time. The group's 16 heads
are the rows of both products, by mma.sync: nothing crosses warps, and the softmax stays within four
lanes. With keys as rows, which wgmma takes, and four warps both kernels are slower.

Traffic: every query reads its blocks' keys and values from L2, 32 kB a block for 64 * 16 * 512
operations: 16 a byte. Two queries of a program that read a block of both once are slower.
"""

# T queries  G key-value heads  M query heads of each  C width  K chosen blocks  L block length

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton
from moe_jax.ops.nsa.triton_runs import LOG2E, NO_SCORE, load_rows, store_rows


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
  K, rows = start_TGK.shape[2], max(M, 16)

  def kernel(q_g, k_g, v_g, start_g, count_g, o_g, lse_g):
    query, group = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
    row, live = _heads(query, group, G, M, rows)
    q = load_rows(q_g, row, C)

    def block(i, carry):
      acc, top, total = carry
      key, key_row = _keys(start_g[(query * G + group) * K + i], query, group, length, T, G)
      k, v = load_rows(k_g, key_row, C), load_rows(v_g, key_row, C)
      s = plt.dot(q, k, trans_b=True) * (scale * LOG2E)
      s = jnp.where((key <= query)[None, :], s, NO_SCORE)
      new_top = jnp.maximum(top, s.max(axis=1))
      rescale = jnp.exp2(top - new_top)
      p = jnp.exp2(s - new_top[:, None])
      acc = acc * rescale[:, None] + plt.dot(p.astype(v.dtype), v)
      return acc, new_top, total * rescale + p.sum(axis=1)

    zero = jnp.zeros((rows,), jnp.float32)
    carry = jnp.zeros((rows, C), jnp.float32), zero + NO_SCORE, zero
    acc, top, total = lax.fori_loop(0, count_g[query], block, carry)
    store_rows(o_g, row, acc / total[:, None], live)
    store_rows(lse_g, row, top + jnp.log2(total), live)

  flat, like = lambda a: a.reshape(-1, a.shape[-1]), jax.ShapeDtypeStruct
  o, lse = pallas_triton.call(
    kernel, flat(q_TGMC), flat(k_TGC), flat(v_TGC), start_TGK.reshape(-1), count_T,
    grid=(T, G), out=(like((T * G * M, C), q_TGMC.dtype), like((T * G * M,), jnp.float32)),
    num_warps=rows // 16, num_stages=2,
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
  K, rows = start_TGK.shape[2], max(M, 16)

  def kernel(q_g, do_g, k_g, v_g, start_g, count_g, lse_g, delta_g, dq_g):
    query, group = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
    row, live = _heads(query, group, G, M, rows)
    q, do = load_rows(q_g, row, C), load_rows(do_g, row, C)
    lse, delta = plt.load(lse_g.at[row]), plt.load(delta_g.at[row])

    def block(i, dq):
      key, key_row = _keys(start_g[(query * G + group) * K + i], query, group, length, T, G)
      k, v = load_rows(k_g, key_row, C), load_rows(v_g, key_row, C)
      s = plt.dot(q, k, trans_b=True) * (scale * LOG2E)
      p = jnp.where((key <= query)[None, :], jnp.exp2(s - lse[:, None]), 0.0)
      ds = p * (plt.dot(do, v, trans_b=True) - delta[:, None]) * scale
      return dq + plt.dot(ds.astype(k.dtype), k)

    dq = lax.fori_loop(0, count_g[query], block, jnp.zeros((rows, C), jnp.float32))
    store_rows(dq_g, row, dq, live)

  flat = lambda a: a.reshape(-1, a.shape[-1])
  dq = pallas_triton.call(
    kernel, flat(q_TGMC), flat(do_TGMC), flat(k_TGC), flat(v_TGC), start_TGK.reshape(-1), count_T,
    lse_TGM.reshape(-1), delta_TGM.reshape(-1),
    grid=(T, G), out=jax.ShapeDtypeStruct((T * G * M, C), q_TGMC.dtype),
    num_warps=rows // 16, num_stages=3,
  )  # fmt: skip
  return dq.reshape(q_TGMC.shape)


def _heads(query, group, G: int, M: int, rows: int):
  head = jnp.arange(rows, dtype=jnp.int32)
  return (query * G + group) * M + jnp.minimum(head, M - 1), head < M


def _keys(start, query, group, length: int, T: int, G: int):
  """A block's tokens, and their rows; those behind the query are the query's own."""
  key = start + jnp.arange(length, dtype=jnp.int32)
  return key, jnp.minimum(key, query) * G + group
