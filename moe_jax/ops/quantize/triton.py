"""Triton kernels that quantise a tile of 128 x 128 along one side or both.

tile     128 x 128 values, read once from x or, by a row index, from the rows it names; each
         direction takes its largest magnitudes, multiplies, rounds, and stores
traffic  2 bytes a value in (bfloat16), 1 out for each copy, and 4 bytes for 128 values of scales
bound    memory; the transposed copy leaves in pieces of 128 bytes
"""

# R rows  K columns  D, F sides of a matrix

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton
from moe_jax.ops.quantize.format import TILE, Format, Quantized, magnitude, scale_and_inverse


def grid_of(row: jax.Array, col: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both indices of every element: the form that GPU and interpreter both take."""
  shape = row.shape[0], col.shape[0]
  return jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(col[None, :], shape)


def store_rows(x: jax.Array, values_ref, scale_ref, row: jax.Array, col: jax.Array, fmt: Format):
  """Quantises a float32 tile of 128 columns by rows and stores it at these rows and columns."""
  num_rows = values_ref.shape[0]
  scale, inverse = scale_and_inverse(magnitude(x).max(1), fmt)
  at = grid_of(row, col)
  plt.store(values_ref.at[at], (x * inverse[:, None]).astype(fmt.dtype), mask=at[0] < num_rows)
  step = jnp.full_like(row, 0) + jax.lax.div(col.min(), TILE)
  plt.store(scale_ref.at[step, row], scale, mask=row < num_rows)


def store_columns(x: jax.Array, values_ref, scale_ref, row: jax.Array, col: jax.Array, fmt: Format):
  """The same by columns, of 128 rows; these are rows and columns of x, not of its transpose."""
  scale, inverse = scale_and_inverse(magnitude(x).max(0), fmt)
  values = (x * inverse[None, :]).astype(fmt.dtype)
  plt.store(values_ref.at[grid_of(col, row)], values.T)
  step = jnp.full_like(col, 0) + jax.lax.div(row.min(), TILE)
  plt.store(scale_ref.at[step, col], scale)


def rows_out(num_rows: int, k: int, fmt: Format) -> Quantized:
  return Quantized(
    jax.ShapeDtypeStruct((num_rows, k), jnp.dtype(fmt.dtype)),
    jax.ShapeDtypeStruct((k // TILE, num_rows), jnp.float32),
  )


def _kernel(*refs, fmt, rows, by_row, by_column, gathered):
  x_ref, *refs = refs
  k = x_ref.shape[1]
  pid, columns = pl.program_id(0), jnp.int32(k // TILE)
  row = jax.lax.div(pid, columns) * rows + jnp.arange(rows)
  col = jax.lax.rem(pid, columns) * TILE + jnp.arange(TILE)
  if gathered:
    token_ref, *refs = refs
    source = plt.load(token_ref.at[row], mask=row < token_ref.shape[0], other=x_ref.shape[0])
  else:
    source = row
  there = source < x_ref.shape[0]
  at = grid_of(jnp.where(there, source, 0), col)
  zero = jnp.zeros((), x_ref.dtype)
  x = plt.load(x_ref.at[at], mask=jnp.broadcast_to(there[:, None], at[0].shape), other=zero)
  x = x.astype(jnp.float32)
  if by_row:
    store_rows(x, *refs[:2], row, col, fmt)
  if by_column:
    store_columns(x, *refs[-2:], row, col, fmt)


def quantize(
  x_RK: jax.Array,
  fmt: Format,
  *,
  token_R: jax.Array | None = None,
  by_row: bool = False,
  by_column: bool = False,
  rows: int | None = None,
  num_warps: int = 8,
) -> tuple[Quantized, ...]:
  """Of x, or of x[token_R]: its rows, its columns, or both in this order."""
  num_rows, k = (x_RK if token_R is None else token_R).shape[0], x_RK.shape[1]
  if rows is None:
    rows = TILE if by_column else 32
  out = [rows_out(num_rows, k, fmt)] * by_row + [rows_out(k, num_rows, fmt)] * by_column
  index = () if token_R is None else (token_R,)
  static = dict(fmt=fmt, rows=rows, by_row=by_row, by_column=by_column, gathered=bool(index))
  found = pallas_triton.call(
    functools.partial(_kernel, **static),
    x_RK,
    *index,
    grid=(pl.cdiv(num_rows, rows) * (k // TILE),),
    out=[part for q in out for part in q],
    num_warps=num_warps,
  )
  return tuple(Quantized(*found[i : i + 2]) for i in range(0, len(found), 2))


def _blocks_kernel(w_ref, *refs, fmt, transposed):
  columns, d_tiles = jnp.int32(w_ref.shape[2] // TILE), jnp.int32(w_ref.shape[1] // TILE)
  pid = pl.program_id(0)
  f, rest = jax.lax.rem(pid, columns), jax.lax.div(pid, columns)
  d, e = jax.lax.rem(rest, d_tiles), jax.lax.div(rest, d_tiles)
  at = grid_of(d * TILE + jnp.arange(TILE), f * TILE + jnp.arange(TILE))
  expert = jnp.full_like(at[0], 0) + e
  w = plt.load(w_ref.at[expert, *at]).astype(jnp.float32)
  scale, inverse = scale_and_inverse(magnitude(w).max(0).max(0), fmt)
  values = (w * inverse).astype(fmt.dtype)
  if 'plain' in transposed:
    values_ref, scale_ref, *refs = refs
    plt.store(values_ref.at[expert, *at], values)
    plt.store(scale_ref.at[e, d, f], scale)
  if 'transposed' in transposed:
    values_ref, scale_ref = refs
    at = grid_of(f * TILE + jnp.arange(TILE), d * TILE + jnp.arange(TILE))
    plt.store(values_ref.at[expert, *at], values.T)
    plt.store(scale_ref.at[e, f, d], scale)


def blocks(w_EDF: jax.Array, fmt: Format, *, want: tuple[str, ...]) -> tuple[Quantized, ...]:
  """128 x 128 blocks of w as it lies ('plain'), of its transpose ('transposed'), or of both."""
  e, d, f = w_EDF.shape
  sides = {'plain': (d, f), 'transposed': (f, d)}
  out = []
  for name in want:
    a, b = sides[name]
    out.append(jax.ShapeDtypeStruct((e, a, b), jnp.dtype(fmt.dtype)))
    out.append(jax.ShapeDtypeStruct((e, a // TILE, b // TILE), jnp.float32))
  found = pallas_triton.call(
    functools.partial(_blocks_kernel, fmt=fmt, transposed=want),
    w_EDF,
    grid=(e * (d // TILE) * (f // TILE),),
    out=out,
    num_warps=8,
  )
  return tuple(Quantized(*found[i : i + 2]) for i in range(0, len(found), 2))
