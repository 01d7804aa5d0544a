"""Triton kernels that quantise a tile of 128 x 128 along one side or both.

tile     128 x 128 values as four parts of 32 rows, part j holding rows j, 4 + j, 8 + j ..., read
         once from x or, by a row index, from the rows it names; each direction takes its largest
         magnitudes, multiplies, rounds, and stores. For the transposed copy the four parts are
         packed into one of 32-bit words, four rows in each, which is transposed: a quarter of the
         elements to exchange between threads
order    row by row of tiles. Squares of tiles, or programs of several tiles that read ahead, were
         tried and are slower
traffic  2 bytes a value in (bfloat16), 1 out for each copy, and 4 bytes for 128 values of scales
bound    memory
"""

# R rows  K columns  D, F sides of a matrix

import functools
from typing import Any

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


def place(k: int, rows: int = TILE) -> tuple[jax.Array, jax.Array]:
  """First row of this program's tile, and its 128 columns."""
  wide = jnp.int32(k // TILE)
  pid = pl.program_id(0)
  return jax.lax.div(pid, wide) * rows, jax.lax.rem(pid, wide) * TILE + jnp.arange(TILE)


def num_tiles(num_rows: int, k: int, rows: int = TILE) -> int:
  return pl.cdiv(num_rows, rows) * (k // TILE)


def parts_of(first_row: jax.Array, rows: int = TILE) -> list[jax.Array]:
  """The rows of each of the four parts."""
  return [first_row + 4 * jnp.arange(rows // 4) + j for j in range(4)]


def store_rows(parts, out, first_row: jax.Array, col: jax.Array, fmt: Format) -> None:
  """Quantises a float32 tile of 128 columns, given in parts, by rows, and stores it."""
  values_ref, scale_ref = out
  num_rows = values_ref.shape[0]
  step = jax.lax.div(col.min(), TILE)
  for x, row in zip(parts, parts_of(first_row, 4 * parts[0].shape[0]), strict=True):
    scale, inverse = scale_and_inverse(magnitude(x).max(1), fmt)
    at = grid_of(row, col)
    plt.store(values_ref.at[at], (x * inverse[:, None]).astype(fmt.dtype), mask=at[0] < num_rows)
    plt.store(scale_ref.at[jnp.full_like(row, 0) + step, row], scale, mask=row < num_rows)


def store_columns(parts, out, first_row: jax.Array, col: jax.Array, fmt: Format) -> None:
  """The same by columns, of 128 rows; these are rows and columns of x, not of its transpose."""
  words_ref, scale_ref = out
  largest = functools.reduce(jnp.maximum, [magnitude(x) for x in parts]).max(0)
  scale, inverse = scale_and_inverse(largest, fmt)
  words = jnp.zeros(parts[0].shape, jnp.uint32)
  for j, x in enumerate(parts):
    values = (x * inverse[None, :]).astype(fmt.dtype)
    words |= jax.lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint32) << (8 * j)
  word = jax.lax.div(first_row, 4) + jnp.arange(TILE // 4)
  plt.store(words_ref.at[grid_of(col, word)], words.T)
  plt.store(scale_ref.at[jnp.full_like(col, 0) + jax.lax.div(first_row, TILE), col], scale)


def rows_out(num_rows: int, k: int, fmt: Format) -> tuple[Any, Any]:
  return (
    jax.ShapeDtypeStruct((num_rows, k), jnp.dtype(fmt.dtype)),
    jax.ShapeDtypeStruct((k // TILE, num_rows), jnp.float32),
  )


def columns_out(num_rows: int, k: int) -> tuple[Any, Any]:
  return (
    jax.ShapeDtypeStruct((k, num_rows // 4), jnp.uint32),
    jax.ShapeDtypeStruct((num_rows // TILE, k), jnp.float32),
  )


def unpack(words: jax.Array, scale: jax.Array, fmt: Format) -> Quantized:
  """Words of four values as values; the bytes in memory are the same."""
  values = jax.lax.bitcast_convert_type(words, jnp.dtype(fmt.dtype))
  return Quantized(values.reshape(words.shape[0], -1), scale)


def _quantize_kernel(*refs, fmt, rows, by_row, by_column, gathered):
  x_ref, *refs = refs
  num_tokens, k = x_ref.shape
  token_ref, refs = (refs[0], refs[1:]) if gathered else (None, refs)
  num_rows = num_tokens if token_ref is None else token_ref.shape[0]
  first_row, col = place(k, rows)
  parts = []
  for source in parts_of(first_row, rows):
    if token_ref is not None:
      source = plt.load(token_ref.at[source], mask=source < num_rows, other=num_tokens)
    there = source < num_tokens
    at = grid_of(source, col)
    mask = jnp.broadcast_to(there[:, None], at[0].shape)
    parts.append(plt.load(x_ref.at[at], mask=mask, other=0.0).astype(jnp.float32))
  if by_row:
    store_rows(parts, refs[:2], first_row, col, fmt)
  if by_column:
    store_columns(parts, refs[-2:], first_row, col, fmt)


def quantize(
  x_RK: jax.Array,
  fmt: Format,
  *,
  token_R: jax.Array | None = None,
  by_row: bool = False,
  by_column: bool = False,
  num_warps: int = 8,
) -> tuple[Quantized, ...]:
  """Of x, or of x[token_R]: its rows, its columns, or both in this order."""
  num_rows, k = (x_RK if token_R is None else token_R).shape[0], x_RK.shape[1]
  rows = TILE if by_column else 32
  index = () if token_R is None else (token_R,)
  static = dict(rows=rows, by_row=by_row, by_column=by_column, gathered=bool(index))
  found = pallas_triton.call(
    functools.partial(_quantize_kernel, fmt=fmt, **static),
    x_RK,
    *index,
    grid=(num_tiles(num_rows, k, rows),),
    out=[*rows_out(num_rows, k, fmt) * by_row, *columns_out(num_rows, k) * by_column],
    num_warps=num_warps,
  )
  row = (Quantized(*found[:2]),) if by_row else ()
  return row + ((unpack(found[-2], found[-1], fmt),) if by_column else ())


def _blocks_kernel(w_ref, *refs, fmt, transposed, via):
  columns, d_tiles = jnp.int32(w_ref.shape[2] // TILE), jnp.int32(w_ref.shape[1] // TILE)
  pid = pl.program_id(0)
  f, rest = jax.lax.rem(pid, columns), jax.lax.div(pid, columns)
  d, e = jax.lax.rem(rest, d_tiles), jax.lax.div(rest, d_tiles)
  at = grid_of(d * TILE + jnp.arange(TILE), f * TILE + jnp.arange(TILE))
  expert = jnp.full_like(at[0], 0) + e
  w = plt.load(w_ref.at[expert, *at])
  w = (w if via is None else w.astype(via)).astype(jnp.float32)
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


def blocks(
  w_EDF: jax.Array, fmt: Format, *, want: tuple[str, ...], via: Any = None
) -> tuple[Quantized, ...]:
  """128 x 128 blocks of w as it lies ('plain'), of its transpose ('transposed'), or of both; of w
  rounded to `via`."""
  e, d, f = w_EDF.shape
  sides = {'plain': (d, f), 'transposed': (f, d)}
  out = []
  for name in want:
    a, b = sides[name]
    out.append(jax.ShapeDtypeStruct((e, a, b), jnp.dtype(fmt.dtype)))
    out.append(jax.ShapeDtypeStruct((e, a // TILE, b // TILE), jnp.float32))
  found = pallas_triton.call(
    functools.partial(_blocks_kernel, fmt=fmt, transposed=want, via=via),
    w_EDF,
    grid=(e * (d // TILE) * (f // TILE),),
    out=out,
    num_warps=8,
  )
  return tuple(Quantized(*found[i : i + 2]) for i in range(0, len(found), 2))
