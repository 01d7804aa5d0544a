"""Triton kernel: gradients of the keys and values in the blocks of tokens that queries chose.

A program per block and group walks the queries that chose it, 4 at a time, in order; those of a
block that many chose, as all did the first, are shared out to several programs, and what these
leave is added up, in order too. Traffic: q and do of every pair of a query and a block, from L2.
"""

# T queries  G key-value heads  M query heads of each  C width  P pairs of a query and a block
# X blocks of a group, by number  W programs  E blocks of several

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton
from moe_jax.ops.nsa.triton_runs import LOG2E, load_rows, store_rows

# heads of queries at a time: with 128, and 8 warps, it takes a quarter longer
_ROWS = 64
# queries of a block that one program walks
_MOST = 2048


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
  rows = max(_ROWS, M)
  queries = rows // M
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
      slot = jnp.arange(rows, dtype=jnp.int32)

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
    grid=(shares.block_W.size,), out=(out, out, parts, parts), num_warps=rows // 16, num_stages=2,
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
