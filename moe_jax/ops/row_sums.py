"""Sums of scattered rows without atomics: the inverse of a gather, the same bits every time.

  order, start = inverse(index)        which rows name each key, in order
  out[s] = sum of rows[order[start[s]:start[s + 1]]]

Sorting pairs by key takes linear time (a radix sort on the GPU), and each key's rows are then read
by one program in a fixed order: each row once, at the speed of device memory.
"""

# N rows  S keys  X width  U queries  P pieces

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton

_ROWS_A_STEP = 8


def inverse(index_N: jax.Array, num_keys: int) -> tuple[jax.Array, jax.Array]:
  """Rows by key, stably, [N], and where each key's begin, [S+1]. Key `num_keys` is nobody's."""
  row_N = jnp.arange(index_N.size, dtype=jnp.int32)
  key_N, order_N = lax.sort((index_N.astype(jnp.int32), row_N), num_keys=1, is_stable=True)
  start = jnp.searchsorted(key_N, jnp.arange(num_keys + 1, dtype=jnp.int32))
  return order_N, start.astype(jnp.int32)


def add_rows(
  total_SX: jax.Array, rows_NX: jax.Array, order_N: jax.Array, start: jax.Array
) -> jax.Array:
  """total + each key's rows, in float32. Rows of nobody may hold anything, NaN included."""
  if jax.default_backend() == 'gpu' and _pieces(rows_NX.shape[1]):
    return triton_add_rows(total_SX, rows_NX, order_N, start)
  num_keys = total_SX.shape[0]
  key_N = jnp.searchsorted(start, jnp.arange(order_N.size), side='right') - 1
  own_NX = jnp.where(key_N[:, None] < num_keys, rows_NX[order_N], 0).astype(jnp.float32)
  sums = jax.ops.segment_sum(own_NX, key_N, num_keys + 1, indices_are_sorted=True)
  return total_SX + sums[:-1]


def _pieces(width: int) -> list[tuple[int, int]]:
  """Powers of two, of at least 32, that make up the width: first column and size."""
  if width % 32:
    return []
  bits = [1 << n for n in reversed(range(width.bit_length())) if width >> n & 1]
  return [(sum(bits[:i]), size) for i, size in enumerate(bits)]


def _sum_of_rows(
  rows_g: Any, row: jax.Array, inside: jax.Array, column: int, size: int
) -> jax.Array:
  """float32 sum, in a kernel, of the rows that are inside, of `size` columns from `column` on."""
  shape = (_ROWS_A_STEP, size)
  columns = column + jnp.arange(size, dtype=jnp.int32)
  index = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(columns[None], shape)
  mask = jnp.broadcast_to(inside[:, None], shape)
  return plt.load(rows_g.at[index], mask=mask, other=0.0).astype(jnp.float32).sum(0)


def triton_add_rows(
  total_SX: jax.Array, rows_NX: jax.Array, order_N: jax.Array, start: jax.Array
) -> jax.Array:
  """As add_rows, by a Pallas-Triton kernel: a program a key, 8 rows at a time."""
  num_keys, X = total_SX.shape
  pieces = _pieces(X)

  def kernel(total_g, rows_g, order_g, start_g, out_g):
    key = pl.program_id(0)
    first, end = start_g[key], start_g[key + 1]

    def step(i, sums):
      at = first + i * _ROWS_A_STEP + jnp.arange(_ROWS_A_STEP, dtype=jnp.int32)
      inside = at < end
      row = plt.load(order_g.at[at], mask=inside, other=0)

      return tuple(
        total + _sum_of_rows(rows_g, row, inside, *at)
        for at, total in zip(pieces, sums, strict=True)
      )

    start_sums = tuple(plt.load(total_g.at[key, pl.ds(*at)]) for at in pieces)
    sums = lax.fori_loop(0, pl.cdiv(end - first, _ROWS_A_STEP), step, start_sums)
    for at, value in zip(pieces, sums, strict=True):
      plt.store(out_g.at[key, pl.ds(*at)], value)

  return pallas_triton.call(
    kernel,
    total_SX,
    rows_NX,
    order_N,
    start,
    grid=(num_keys,),
    out=jax.ShapeDtypeStruct(total_SX.shape, jnp.float32),
    aliases={0: 0},
  )


def add_runs(
  total_PSX: jax.Array,
  rows_BUJX: jax.Array,
  first_U: jax.Array,
  begin_S: jax.Array,
  end_S: jax.Array,
  *,
  base: int,
) -> jax.Array:
  """total + each key's rows, where query u has one for each of the keys first[u], first[u] + 1, ..

  They are rows[:, u, base], rows[:, u, base + 1], ... No sort is needed: a key's queries are
  neighbours, begin[s] <= u < end[s], of which piece p of the total gets an equal share. So keys
  that nearly all queries see are summed by several programs.
  """
  if jax.default_backend() == 'gpu' and _pieces(rows_BUJX.shape[-1]):
    return triton_add_runs(total_PSX, rows_BUJX, first_U, begin_S, end_S, base=base)
  U = first_U.size
  query_U, key_S1 = jnp.arange(U), jnp.arange(begin_S.size)[:, None]
  seen_SU = (query_U >= begin_S[:, None]) & (query_U < end_S[:, None])
  slot_SU = jnp.where(seen_SU, base + key_S1 - first_U, 0)
  part_BSUX = jnp.where(seen_SU[..., None], rows_BUJX[:, query_U, slot_SU], 0)
  return total_PSX.at[0].add(part_BSUX.astype(jnp.float32).sum((0, 2)))


def triton_add_runs(
  total_PSX: jax.Array,
  rows_BUJX: jax.Array,
  first_U: jax.Array,
  begin_S: jax.Array,
  end_S: jax.Array,
  *,
  base: int,
) -> jax.Array:
  """As add_runs, by a Pallas-Triton kernel: a program a key and piece, 8 rows at a time."""
  (P, S, X), (B, U, J, _) = total_PSX.shape, rows_BUJX.shape
  pieces = _pieces(X)

  def kernel(total_g, rows_g, first_g, begin_g, end_g, out_g):
    key, piece = pl.program_id(0), pl.program_id(1)
    begin, end = begin_g[key], end_g[key]

    # the result is in the total's place
    @pl.when(end > begin)
    def _():
      low, high = (begin + (end - begin) * n // P for n in (piece, piece + 1))

      def step(i, sums):
        query = low + i * _ROWS_A_STEP + jnp.arange(_ROWS_A_STEP, dtype=jnp.int32)
        inside = query < high
        slot = base + key - plt.load(first_g.at[query], mask=inside, other=0)

        def part(column, size, total):
          for block in range(B):
            row = jnp.where(inside, (block * U + query) * J + slot, 0)
            total = total + _sum_of_rows(rows_g, row, inside, column, size)
          return total

        return tuple(part(*at, total) for at, total in zip(pieces, sums, strict=True))

      row = piece * S + key
      start_sums = tuple(plt.load(total_g.at[row, pl.ds(*at)]) for at in pieces)
      sums = lax.fori_loop(0, pl.cdiv(high - low, _ROWS_A_STEP), step, start_sums)
      for at, value in zip(pieces, sums, strict=True):
        plt.store(out_g.at[row, pl.ds(*at)], value)

  flat = total_PSX.reshape(P * S, X)
  out = pallas_triton.call(
    kernel, flat, rows_BUJX.reshape(-1, X), first_U, begin_S, end_S,
    grid=(S, P), out=jax.ShapeDtypeStruct(flat.shape, jnp.float32), aliases={0: 0},
  )  # fmt: skip
  return out.reshape(P, S, X)
