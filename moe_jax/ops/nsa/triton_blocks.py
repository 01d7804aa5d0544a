"""Triton kernels: attention of a group's heads over the blocks of tokens that a query chose.

  forward   a program per query and group: one block of 64 keys at a time, keys as the rows of both
  and dq    products, so that the tensor cores run although a query has only 16 heads
  dk, dv    a program per block and group walks the queries that chose it, 8 at a time, in order;
            those of a block that many chose, as all did the first, are shared out to several
            programs, and what these leave is added up, in order too

Traffic of the first two: every query reads its blocks' keys and values from L2, 32 kB a block for
64 * 16 * 512 operations: 16 a byte, so an L2 that delivers 5.5 TB/s allows 90 TFLOP/s. The third
reads queries instead, and 8 of them share each block.
"""

# T queries  G key-value heads  M query heads of each  C width  K chosen blocks  L block length
# P pairs of a query and a block  X blocks of a group, by number  W programs  E blocks of several

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton
from moe_jax.ops.nsa.triton_runs import LOG2E, NO_SCORE, ROWS, load_rows, store_rows

# queries of a block that one program walks
_MOST = 2048


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
      s = plt.dot(k, q, trans_b=True) * (scale * LOG2E)
      s = jnp.where((key <= query)[:, None], s, NO_SCORE)
      new_top = jnp.maximum(top, s.max(axis=0))
      rescale = jnp.exp2(top - new_top)
      p = jnp.exp2(s - new_top[None, :])
      acc = acc * rescale[None, :] + plt.dot(v, p.astype(v.dtype), trans_a=True)
      return acc, new_top, total * rescale + p.sum(axis=0)

    zero = jnp.zeros((rows,), jnp.float32)
    carry = jnp.zeros((C, rows), jnp.float32), zero + NO_SCORE, zero
    acc, top, total = lax.fori_loop(0, count_g[query], block, carry)
    store_rows(o_g, row, (acc / total[None, :]).T, live)
    store_rows(lse_g, row, top + jnp.log2(total), live)

  flat, like = lambda a: a.reshape(-1, a.shape[-1]), jax.ShapeDtypeStruct
  o, lse = pallas_triton.call(
    kernel, flat(q_TGMC), flat(k_TGC), flat(v_TGC), start_TGK.reshape(-1), count_T,
    grid=(T, G), out=(like((T * G * M, C), q_TGMC.dtype), like((T * G * M,), jnp.float32)),
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
  K, rows = start_TGK.shape[2], max(M, 16)

  def kernel(q_g, do_g, k_g, v_g, start_g, count_g, lse_g, delta_g, dq_g):
    query, group = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
    row, live = _heads(query, group, G, M, rows)
    q, do = load_rows(q_g, row, C), load_rows(do_g, row, C)
    lse, delta = plt.load(lse_g.at[row]), plt.load(delta_g.at[row])

    def block(i, dq):
      key, key_row = _keys(start_g[(query * G + group) * K + i], query, group, length, T, G)
      k, v = load_rows(k_g, key_row, C), load_rows(v_g, key_row, C)
      s = plt.dot(k, q, trans_b=True) * (scale * LOG2E)
      p = jnp.where((key <= query)[:, None], jnp.exp2(s - lse[None, :]), 0.0)
      ds = p * (plt.dot(v, do, trans_b=True) - delta[None, :]) * scale
      return dq + plt.dot(k, ds.astype(k.dtype), trans_a=True)

    dq = lax.fori_loop(0, count_g[query], block, jnp.zeros((C, rows), jnp.float32))
    store_rows(dq_g, row, dq.T, live)

  flat = lambda a: a.reshape(-1, a.shape[-1])
  dq = pallas_triton.call(
    kernel, flat(q_TGMC), flat(do_TGMC), flat(k_TGC), flat(v_TGC), start_TGK.reshape(-1), count_T,
    lse_TGM.reshape(-1), delta_TGM.reshape(-1),
    grid=(T, G), out=jax.ShapeDtypeStruct((T * G * M, C), q_TGMC.dtype), num_warps=4, num_stages=3,
  )  # fmt: skip
  return dq.reshape(q_TGMC.shape)


def key_gradient(
  totals: tuple[jax.Array, jax.Array],
  q_TGMC: jax.Array,
  do_TGMC: jax.Array,
  k_TGC: jax.Array,
  v_TGC: jax.Array,
  order_P: jax.Array,
  begin: jax.Array,
  lse_TGM: jax.Array,
  delta_TGM: jax.Array,
  *,
  length: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """totals, float32 [T, G, C] each, plus dk and dv of some queries' choices.

  Args:
    order_P: queries, by (first token of a block they chose, group), in order.
    begin: [T * G + 1], where each block's begin; blocks are numbered by their first token.
  """
  T, G, M, C = q_TGMC.shape
  queries = ROWS // M
  shares, num_places = _shares(begin, order_P.size)
  read = lambda ref, row: load_rows(ref, row, C)

  def kernel(
    dk_in, dv_in, q_g, do_g, k_g, v_g, order_g, begin_g, block_g, piece_g, place_g, lse_g, delta_g,
    dk_g, dv_g, dk_part_g, dv_part_g,
  ):  # fmt: skip
    share = pl.program_id(0)
    block, place = block_g[share], place_g[share]

    @pl.when(block < T * G)
    def _():
      start, group = block // G, block % G
      first = begin_g[block] + piece_g[share] * _MOST
      end = jnp.minimum(begin_g[block + 1], first + _MOST)
      key = start + jnp.arange(length, dtype=jnp.int32)
      key_row = jnp.minimum(key, T - 1) * G + group
      k, v = read(k_g, key_row), read(v_g, key_row)
      slot = jnp.arange(ROWS, dtype=jnp.int32)

      def step(i, carry):
        dk, dv = carry
        at = first + i * queries + slot // M
        query = plt.load(order_g.at[jnp.minimum(at, end - 1)])
        row = (query * G + group) * M + slot % M
        q, do = read(q_g, row), read(do_g, row)
        lse, delta = plt.load(lse_g.at[row]), plt.load(delta_g.at[row])
        seen = (key[None, :] <= query[:, None]) & (at < end)[:, None]
        s = plt.dot(q, k, trans_b=True) * (scale * LOG2E)
        p = jnp.where(seen, jnp.exp2(s - lse[:, None]), 0.0)
        ds = p * (plt.dot(do, v, trans_b=True) - delta[:, None]) * scale
        dv = dv + plt.dot(p.astype(do.dtype), do, trans_a=True)
        return dk + plt.dot(ds.astype(q.dtype), q, trans_a=True), dv

      zeros = jnp.zeros((length, C), jnp.float32)
      dk, dv = lax.fori_loop(0, pl.cdiv(end - first, queries), step, (zeros, zeros))
      # behind the last query may be another block's tokens, which are another program's
      alone = (key <= order_g[end - 1]) & (place < 0)
      part_row = place * length + jnp.arange(length, dtype=jnp.int32)
      for total_g, part_g, in_g, sums in (
        (dk_g, dk_part_g, dk_in, dk),
        (dv_g, dv_part_g, dv_in, dv),
      ):
        store_rows(total_g, key_row, read(in_g, key_row) + sums, alone)
        store_rows(part_g, part_row, sums, part_row >= 0)

  flat, like = lambda a: a.reshape(-1, a.shape[-1]), jax.ShapeDtypeStruct
  out, parts = like((T * G, C), jnp.float32), like((num_places * length, C), jnp.float32)
  dk, dv, dk_part, dv_part = pallas_triton.call(
    kernel, *map(flat, (*totals, q_TGMC, do_TGMC, k_TGC, v_TGC)), order_P, begin,
    shares.block_W, shares.piece_W, shares.place_W, lse_TGM.reshape(-1), delta_TGM.reshape(-1),
    grid=(shares.block_W.size,), out=(out, out, parts, parts), num_warps=8, num_stages=2,
    aliases={0: 0, 1: 1},
  )  # fmt: skip

  def add_up(dk_in, dv_in, dk_part_g, dv_part_g, order_g, begin_g, block_g, place_g, dk_g, dv_g):
    block, first, end = (
      ref[pl.program_id(0) + ahead] for ref, ahead in ((block_g, 0), (place_g, 0), (place_g, 1))
    )

    @pl.when(block < T * G)
    def _():
      key = block // G + jnp.arange(length, dtype=jnp.int32)
      key_row = jnp.minimum(key, T - 1) * G + block % G
      used = key <= order_g[begin_g[block + 1] - 1]

      def part(place, carry):
        row = place * length + jnp.arange(length, dtype=jnp.int32)
        return carry[0] + read(dk_part_g, row), carry[1] + read(dv_part_g, row)

      dk, dv = lax.fori_loop(first, end, part, (read(dk_in, key_row), read(dv_in, key_row)))
      store_rows(dk_g, key_row, dk, used)
      store_rows(dv_g, key_row, dv, used)

  dk, dv = pallas_triton.call(
    add_up, dk, dv, dk_part, dv_part, order_P, begin, shares.shared_E, shares.first_E,
    grid=(shares.shared_E.size,), out=(out, out), num_warps=8, aliases={0: 0, 1: 1},
  )  # fmt: skip
  return dk.reshape(k_TGC.shape), dv.reshape(k_TGC.shape)


class _Shares(NamedTuple):
  """Programs' blocks, X for those without one, which piece of its queries, and where it leaves
  what it sums: nowhere (-1) if it is the only one. Then the blocks of several, X behind the last,
  and the first place of each."""

  block_W: jax.Array
  piece_W: jax.Array
  place_W: jax.Array
  shared_E: jax.Array
  first_E: jax.Array


def _shares(begin: jax.Array, num_pairs: int) -> tuple[_Shares, int]:
  """Who walks which pairs, and how many places there are for sums."""
  X = begin.size - 1
  pieces_X = pl.cdiv(begin[1:] - begin[:-1], _MOST)
  end_X = jnp.cumsum(pieces_X, dtype=jnp.int32)
  share_W = jnp.arange(num_pairs // _MOST + min(X, num_pairs), dtype=jnp.int32)
  block_W = jnp.searchsorted(end_X, share_W, side='right').astype(jnp.int32)
  within = jnp.minimum(block_W, X - 1)
  piece_W = share_W - (end_X - pieces_X)[within]
  places_X = jnp.where(pieces_X > 1, pieces_X, 0)
  place_X = jnp.cumsum(places_X, dtype=jnp.int32) - places_X
  place_W = jnp.where(pieces_X[within] > 1, place_X[within] + piece_W, -1)
  # such a block has at least so many pairs, and at most twice the pieces that these would fill
  most = num_pairs // _MOST + 1
  shared_E = jnp.nonzero(pieces_X > 1, size=most, fill_value=X)[0].astype(jnp.int32)
  # of the last one and of none behind it
  first_E = jnp.append(place_X, places_X.sum())[jnp.append(shared_E, X)]
  return _Shares(block_W, piece_W, place_W, shared_E, first_E), 2 * most


def _heads(query, group, G: int, M: int, rows: int):
  head = jnp.arange(rows, dtype=jnp.int32)
  return (query * G + group) * M + jnp.minimum(head, M - 1), head < M


def _keys(start, query, group, length: int, T: int, G: int):
  """A block's tokens, and their rows; those behind the query are the query's own."""
  key = start + jnp.arange(length, dtype=jnp.int32)
  return key, jnp.minimum(key, query) * G + group
