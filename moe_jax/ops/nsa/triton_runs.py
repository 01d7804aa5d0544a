"""Triton kernels: attention of grouped heads over a run of neighbouring keys for each query.

  tile      128 rows: all heads of a group, of as many neighbouring queries; 64 keys at a time
  forward   a program per tile walks the keys from its queries' first to their last
  backward  one kernel per tile for dq; one per 64 keys, walking the queries that see any of them,
            for dk and dv: nothing is added up across programs, so it is the same every time

A run is a query's window, or the compressed blocks that are whole by its token. Bound: the tensor
cores, and the softmax between the products, which Triton does not overlap with them.
"""

# T queries  G key-value heads  M query heads of each  C width  R keys

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton

LOG2E = math.log2(math.e)
NO_SCORE = -1e30
ROWS, KEYS = 128, 64
# programs that share the queries of a block of keys, the first of which all later ones see
_PIECES = 8


def load_rows(ref, row, width: int, mask=None):
  """[rows, width] of a matrix, zeros where masked."""
  shape = row.size, width
  index = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(jnp.arange(width)[None], shape)
  if mask is None:
    return plt.load(ref.at[index])
  return plt.load(ref.at[index], mask=jnp.broadcast_to(mask[:, None], shape), other=0.0)


def store_rows(ref, row, value, mask) -> None:
  """Writes the rows that are not masked."""
  # interpreted, a masked place is written with what it held: send it past the end
  row = jnp.where(mask, row, ref.shape[0])
  if value.ndim == 1:
    plt.store(ref.at[row], value.astype(ref.dtype), mask=mask)
    return
  shape = value.shape
  index = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
  mask = jnp.broadcast_to(mask[:, None], shape)
  plt.store(ref.at[index], value.astype(ref.dtype), mask=mask)


class Tile:
  """128 rows of a group: its heads, of `queries` neighbouring queries from `first` on."""

  def __init__(self, first, group, num_queries: int, G: int, M: int):
    row = jnp.arange(ROWS, dtype=jnp.int32)
    self.query = first + row // M
    self.live = self.query < num_queries
    self.query = jnp.minimum(self.query, num_queries - 1)
    self.row = (self.query * G + group) * M + row % M


def _visible(key, first, count):
  behind = key[None, :] - first[:, None]
  return (behind >= 0) & (behind < count[:, None])


def forward(
  q_TGMC: jax.Array,
  k_RGC: jax.Array,
  v_RGC: jax.Array,
  first_T: jax.Array,
  count_T: jax.Array,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Outputs like q and their base-2 logsumexp [T, G, M]; zeros and -1e30 for an empty run."""
  T, G, M, C = q_TGMC.shape
  R, queries = k_RGC.shape[0], ROWS // M

  def kernel(q_g, k_g, v_g, first_g, count_g, o_g, lse_g):
    # the longest first
    at = pl.num_programs(0) - 1 - pl.program_id(0)
    group = pl.program_id(1)
    tile = Tile(at * queries, group, T, G, M)
    q = load_rows(q_g, tile.row, C)
    first, count = plt.load(first_g.at[tile.query]), plt.load(count_g.at[tile.query])
    begin, full, steps = _walk(first, count, R)

    def block(i, carry, masked):
      acc, top, total = carry
      key = begin + i * KEYS + jnp.arange(KEYS, dtype=jnp.int32)
      row = jnp.minimum(key, R - 1) * G + group
      k = load_rows(k_g, row, C)
      s = plt.dot(q, k, trans_b=True) * (scale * LOG2E)
      if masked:
        s = jnp.where(_visible(key, first, count), s, NO_SCORE)
      new_top = jnp.maximum(top, s.max(axis=1))
      rescale = jnp.exp2(top - new_top)
      p = jnp.exp2(s - new_top[:, None])
      if masked:
        # a query that has not seen a key yet
        p = jnp.where(s > NO_SCORE, p, 0.0)
      v = load_rows(v_g, row, C)
      acc = acc * rescale[:, None] + plt.dot(p.astype(v.dtype), v)
      return acc, new_top, total * rescale + p.sum(axis=1)

    zero = jnp.zeros((ROWS,), jnp.float32)
    carry = jnp.zeros((ROWS, C), jnp.float32), zero + NO_SCORE, zero
    acc, top, total = _both(block, full, steps, carry)
    store_rows(o_g, tile.row, acc / jnp.maximum(total, 1e-30)[:, None], tile.live)
    lse = jnp.where(total > 0, top + jnp.log2(jnp.maximum(total, 1e-30)), NO_SCORE)
    store_rows(lse_g, tile.row, lse, tile.live)

  flat, like = lambda a: a.reshape(-1, a.shape[-1]), jax.ShapeDtypeStruct
  o, lse = pallas_triton.call(
    kernel, flat(q_TGMC), flat(k_RGC), flat(v_RGC), first_T, count_T,
    grid=(pl.cdiv(T, queries), G),
    out=(like((T * G * M, C), q_TGMC.dtype), like((T * G * M,), jnp.float32)),
    num_warps=8, num_stages=3,
  )  # fmt: skip
  return o.reshape(q_TGMC.shape), lse.reshape(T, G, M)


def _walk(first, count, num_keys: int):
  """The first key that any of these queries sees; then how many blocks of keys from there on all of
  them see, and how many blocks there are to walk."""
  some = count > 0
  begin = jnp.where(some, first, num_keys).min()
  end = jnp.where(some, first + count, 0).max()
  steps = jnp.maximum(pl.cdiv(end - begin, KEYS), 0)
  common = jnp.where(first.max() == begin, (first + count).min() - begin, 0)
  return begin, jnp.clip(common // KEYS, 0, steps), steps


def _both(block, full, steps, carry):
  """block(i, carry, masked) without masks as far as none are needed, then with them."""
  carry = lax.fori_loop(0, full, lambda i, c: block(i, c, False), carry)
  return lax.fori_loop(full, steps, lambda i, c: block(i, c, True), carry)


def query_gradient(
  q_TGMC: jax.Array,
  do_TGMC: jax.Array,
  k_RGC: jax.Array,
  v_RGC: jax.Array,
  first_T: jax.Array,
  count_T: jax.Array,
  lse_TGM: jax.Array,
  delta_TGM: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  T, G, M, C = q_TGMC.shape
  R, queries = k_RGC.shape[0], ROWS // M

  def kernel(q_g, do_g, k_g, v_g, first_g, count_g, lse_g, delta_g, dq_g):
    at = pl.num_programs(0) - 1 - pl.program_id(0)
    group = pl.program_id(1)
    tile = Tile(at * queries, group, T, G, M)
    q, do = load_rows(q_g, tile.row, C), load_rows(do_g, tile.row, C)
    lse, delta = plt.load(lse_g.at[tile.row]), plt.load(delta_g.at[tile.row])
    first, count = plt.load(first_g.at[tile.query]), plt.load(count_g.at[tile.query])
    begin, full, steps = _walk(first, count, R)

    def block(i, dq, masked):
      key = begin + i * KEYS + jnp.arange(KEYS, dtype=jnp.int32)
      row = jnp.minimum(key, R - 1) * G + group
      k, v = load_rows(k_g, row, C), load_rows(v_g, row, C)
      p = jnp.exp2(plt.dot(q, k, trans_b=True) * (scale * LOG2E) - lse[:, None])
      if masked:
        p = jnp.where(_visible(key, first, count), p, 0.0)
      ds = p * (plt.dot(do, v, trans_b=True) - delta[:, None]) * scale
      return dq + plt.dot(ds.astype(k.dtype), k)

    dq = _both(block, full, steps, jnp.zeros((ROWS, C), jnp.float32))
    store_rows(dq_g, tile.row, dq, tile.live)

  flat = lambda a: a.reshape(-1, a.shape[-1])
  dq = pallas_triton.call(
    kernel, flat(q_TGMC), flat(do_TGMC), flat(k_RGC), flat(v_RGC), first_T, count_T,
    lse_TGM.reshape(-1), delta_TGM.reshape(-1),
    grid=(pl.cdiv(T, queries), G), out=jax.ShapeDtypeStruct((T * G * M, C), q_TGMC.dtype),
    num_warps=8, num_stages=2,
  )  # fmt: skip
  return dq.reshape(q_TGMC.shape)


def key_gradient(
  q_TGMC: jax.Array,
  do_TGMC: jax.Array,
  k_RGC: jax.Array,
  v_RGC: jax.Array,
  first_T: jax.Array,
  count_T: jax.Array,
  lse_TGM: jax.Array,
  delta_TGM: jax.Array,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """dk and dv, in k's dtype."""
  T, G, M, C = q_TGMC.shape
  R, queries = k_RGC.shape[0], ROWS // M
  blocks = pl.cdiv(R, KEYS)
  bounds_4B = _seen_by(first_T, count_T, blocks, queries)

  def kernel(q_g, do_g, k_g, v_g, first_g, count_g, lse_g, delta_g, bounds_g, dk_g, dv_g):
    at, group, piece = (pl.program_id(i) for i in range(3))
    key = at * KEYS + jnp.arange(KEYS, dtype=jnp.int32)
    row = jnp.minimum(key, R - 1) * G + group
    k, v = load_rows(k_g, row, C), load_rows(v_g, row, C)
    begin, full_begin, full_end, end = (bounds_g[i * blocks + at] for i in range(4))
    # an equal share of the tiles
    low = begin + (end - begin) * piece // _PIECES
    high = begin + (end - begin) * (piece + 1) // _PIECES

    def block(i, carry, masked):
      dk, dv = carry
      tile = Tile(i * queries, group, T, G, M)
      q, do = load_rows(q_g, tile.row, C), load_rows(do_g, tile.row, C)
      lse, delta = plt.load(lse_g.at[tile.row]), plt.load(delta_g.at[tile.row])
      p = jnp.exp2(plt.dot(q, k, trans_b=True) * (scale * LOG2E) - lse[:, None])
      if masked:
        first, count = plt.load(first_g.at[tile.query]), plt.load(count_g.at[tile.query])
        p = jnp.where(_visible(key, first, count) & tile.live[:, None], p, 0.0)
      ds = p * (plt.dot(do, v, trans_b=True) - delta[:, None]) * scale
      dv = dv + plt.dot(p.astype(do.dtype), do, trans_a=True)
      return dk + plt.dot(ds.astype(q.dtype), q, trans_a=True), dv

    zeros = jnp.zeros((KEYS, C), jnp.float32)
    carry = zeros, zeros
    middle = jnp.clip(full_begin, low, high), jnp.clip(full_end, low, high)
    carry = lax.fori_loop(low, middle[0], lambda i, c: block(i, c, True), carry)
    carry = lax.fori_loop(*middle, lambda i, c: block(i, c, False), carry)
    dk, dv = lax.fori_loop(middle[1], high, lambda i, c: block(i, c, True), carry)
    place = (piece * R + key) * G + group
    store_rows(dk_g, place, dk, key < R)
    store_rows(dv_g, place, dv, key < R)

  flat = lambda a: a.reshape(-1, a.shape[-1])
  out = jax.ShapeDtypeStruct((_PIECES * R * G, C), jnp.float32)
  parts = pallas_triton.call(
    kernel, flat(q_TGMC), flat(do_TGMC), flat(k_RGC), flat(v_RGC), first_T, count_T,
    lse_TGM.reshape(-1), delta_TGM.reshape(-1), bounds_4B.reshape(-1),
    grid=(blocks, G, _PIECES), out=(out, out), num_warps=8, num_stages=2,
  )  # fmt: skip
  dk, dv = (a.reshape(_PIECES, *k_RGC.shape).sum(0).astype(k_RGC.dtype) for a in parts)
  return dk, dv


def importance(
  q_TGMC: jax.Array,
  k_RGC: jax.Array,
  first_T: jax.Array,
  count_T: jax.Array,
  lse_TGM: jax.Array,
  start: jax.Array,
  *,
  queries: int,
  scale: float,
) -> jax.Array:
  """float32 [queries, G, R]: `forward`'s probabilities, summed over the heads of a group.

  Of `queries` queries from `start` on. What a query does not see may hold anything.
  """
  T, G, M, C = q_TGMC.shape
  R, per_tile = k_RGC.shape[0], ROWS // M

  def kernel(q_g, k_g, first_g, count_g, lse_g, start_g, out_g):
    at, group = pl.program_id(0), pl.program_id(1)
    tile = Tile(start_g[0] + at * per_tile, group, T, G, M)
    q, lse = load_rows(q_g, tile.row, C), plt.load(lse_g.at[tile.row])
    first, count = plt.load(first_g.at[tile.query]), plt.load(count_g.at[tile.query])
    begin, _, steps = _walk(first, count, R)
    query = at * per_tile + jnp.arange(per_tile, dtype=jnp.int32)

    def block(i, _):
      key = begin + i * KEYS + jnp.arange(KEYS, dtype=jnp.int32)
      k = load_rows(k_g, jnp.minimum(key, R - 1) * G + group, C)
      p = jnp.exp2(plt.dot(q, k, trans_b=True) * (scale * LOG2E) - lse[:, None])
      shape = per_tile, KEYS
      inside = (query < queries)[:, None] & (key < R)[None, :]
      row = jnp.where(inside, jnp.broadcast_to((query * G + group)[:, None], shape), queries * G)
      index = row, jnp.broadcast_to(key[None, :], shape)
      plt.store(out_g.at[index], p.reshape(per_tile, M, KEYS).sum(1), mask=inside)

    lax.fori_loop(0, steps, block, None)

  flat = lambda a: a.reshape(-1, a.shape[-1])
  out = pallas_triton.call(
    kernel, flat(q_TGMC), flat(k_RGC), first_T, count_T, lse_TGM.reshape(-1), start,
    grid=(pl.cdiv(queries, per_tile), G),
    out=jax.ShapeDtypeStruct((queries * G, R), jnp.float32),
    num_warps=8, num_stages=2,
  )  # fmt: skip
  return out.reshape(queries, G, R)


def _seen_by(first_T: jax.Array, count_T: jax.Array, blocks: int, queries: int) -> jax.Array:
  """Tiles of queries of each block of keys, [4, blocks]: from the first that sees any of its keys,
  and of those that see all, the first and the one behind the last, to behind the last of any."""
  tiles = pl.cdiv(first_T.size, queries)
  pad = tiles * queries - first_T.size
  count_NQ = jnp.pad(count_T, (0, pad)).reshape(tiles, queries)
  first_NQ = jnp.pad(first_T, (0, pad)).reshape(tiles, queries)
  some, most = count_NQ > 0, jnp.iinfo(jnp.int32).max
  low_N = jnp.where(some, first_NQ, most).min(1)
  high_N = jnp.where(some, first_NQ + count_NQ, 0).max(1)
  start_B1 = jnp.arange(blocks, dtype=jnp.int32)[:, None] * KEYS
  any_BN = (low_N < start_B1 + KEYS) & (high_N > start_B1)
  all_BN = (first_NQ.max(1) <= start_B1) & ((first_NQ + count_NQ).min(1) >= start_B1 + KEYS)
  index_N = jnp.arange(tiles, dtype=jnp.int32)

  def ends(seen_BN):
    end_B = jnp.where(seen_BN, index_N + 1, 0).max(1)
    return jnp.minimum(jnp.where(seen_BN, index_N, tiles).min(1), end_B), end_B

  (begin_B, end_B), (full_B, full_end_B) = ends(any_BN), ends(all_BN)
  return jnp.stack([begin_B, full_B, full_end_B, end_B]).astype(jnp.int32)
