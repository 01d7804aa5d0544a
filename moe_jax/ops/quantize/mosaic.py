"""Hopper kernels that quantise both ways from one reading: rows and columns, and blocks.

The tile and its ring are those of mosaic_tiles.py.

traffic  2 or 4 bytes a value in, 2 out, and 4 bytes for 64 values of scales
bound    memory
"""

# R rows  K columns  D, F sides of a matrix  E matrices

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.quantize.format import TILE, Format, Quantized, magnitude, scale_and_inverse
from moe_jax.ops.quantize.mosaic_tiles import (
  COLUMNS,
  HALF,
  LAYOUT,
  LINE,
  aligned,
  each_tile,
  largest_of,
  launch,
  settle,
  store_largest,
  store_transposed,
  store_warps_largest,
  unsupported,
)
from moe_jax.ops.varying import match_vma

__all__ = ['blocks', 'rows_and_columns', 'unsupported']


@functools.partial(jax.jit, static_argnames=('fmt', 'stages', 'pairs', 'native'))
def rows_and_columns(
  x_RK: jax.Array,
  fmt: Format,
  *,
  stages: int = 2,
  pairs: int = 2,
  native: bool = True,
) -> tuple[Quantized, Quantized]:
  """`native` is False in the interpreter."""
  num_rows, k = x_RK.shape
  dtype, high, wide = jnp.dtype(fmt.dtype), num_rows // TILE, k // TILE

  def kernel(x_g, row_g, row_scale_g, col_g, col_scale_g, *scratch):
    x_s, row_s, col_s, most_row_s, most_col_s, scale_s, inverse_s, full, met = scratch

    def place(tile):
      """Row and column."""
      return lax.div(tile, jnp.int32(wide)), lax.rem(tile, jnp.int32(wide))

    def bring(tile, pair, slot):
      row, column = place(tile)
      to = x_s.at[pair, slot]
      plgpu.copy_gmem_to_smem(x_g.at[aligned(row), aligned(column)], to, full.at[pair, slot])

    def work(tile, pair, side, slot, odd, meet):
      half = aligned(side, HALF)
      plgpu.barrier_wait(full.at[pair, slot])
      x = plgpu.load(x_s.at[pair, slot, :, half], layout=LAYOUT).astype(jnp.float32)
      bits = magnitude(x)
      most_row_s[pair, odd, side] = bits.max(1)
      store_largest(most_col_s, bits, pair * 2 + odd, side, native=native)
      meet()
      largest = largest_of(most_row_s.at[pair, odd]), largest_of(most_col_s.at[pair * 2 + odd])
      # the last tile's results have left
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for n, bits in enumerate(largest):
        scale_s[pair, side, n], inverse_s[pair, side, n] = scale_and_inverse(bits, fmt)
      settle()
      inverse = plgpu.load(inverse_s.at[pair, side, 0], layout=LAYOUT.reduce(1))
      row_s[pair, side] = (x * lax.broadcast_in_dim(inverse, x.shape, [0])).astype(dtype)
      inverse = plgpu.load(inverse_s.at[pair, side, 1, half], layout=LAYOUT.reduce(0))
      by_column = (x * lax.broadcast_in_dim(inverse, x.shape, [1])).astype(dtype)
      store_transposed(col_s, by_column, pair * 2 + side, native=native)
      settle()

      row, column = place(tile)
      own = aligned(column * 2 + side, HALF)
      plgpu.copy_smem_to_gmem(row_s.at[pair, side], row_g.at[aligned(row), own])
      plgpu.copy_smem_to_gmem(col_s.at[pair * 2 + side], col_g.at[own, aligned(row)])

      @pl.when(side == 0)
      def _():
        plgpu.copy_smem_to_gmem(scale_s.at[pair, 0, 0], row_scale_g.at[column, aligned(row)])
        plgpu.copy_smem_to_gmem(scale_s.at[pair, 0, 1], col_scale_g.at[row, aligned(column)])

    each_tile(high * wide, pairs=pairs, stages=stages, met=met, bring=bring, work=work)

  array = jax.ShapeDtypeStruct
  found = launch(
    kernel,
    'quantize_rows_and_columns',
    pairs=pairs,
    out=(
      array((num_rows, k), dtype),
      array((wide, num_rows), jnp.float32),
      array((k, num_rows), dtype),
      array((high, k), jnp.float32),
    ),
    scratch=(
      plgpu.SMEM((pairs, stages, TILE, TILE), x_RK.dtype),
      plgpu.SMEM((pairs, 2, TILE, HALF), dtype),
      plgpu.SMEM((pairs * 2, HALF, TILE), dtype, transforms=COLUMNS),
      plgpu.SMEM((pairs, 2, 2, TILE), jnp.int32),
      plgpu.SMEM((pairs * 2, 4, TILE), jnp.int32),
      plgpu.SMEM((pairs, 2, 2, TILE), jnp.float32),
      plgpu.SMEM((pairs, 2, 2, TILE), jnp.float32),
      plgpu.Barrier(num_arrivals=1, num_barriers=(pairs, stages)),
      plgpu.Barrier(num_arrivals=2, num_barriers=pairs),
    ),
  )(x_RK)
  _, *found = match_vma(x_RK, *found)
  return Quantized(*found[:2]), Quantized(*found[2:])


@functools.partial(jax.jit, static_argnames=('fmt', 'via', 'stages', 'pairs', 'native'))
def blocks(
  w_EDF: jax.Array,
  fmt: Format,
  *,
  via: Any = None,
  stages: int = 0,
  pairs: int = 2,
  native: bool = True,
) -> tuple[Quantized, Quantized]:
  """128 x 128 blocks of w, rounded to `via` first, as it lies and transposed."""
  num, d, f = w_EDF.shape
  dtype, high, wide = jnp.dtype(fmt.dtype), d // TILE, f // TILE
  stages = stages or (2 if w_EDF.dtype.itemsize == 2 else 1)

  def where(tile):
    """Matrix, row and column of a tile."""
    rest, column = lax.div(tile, jnp.int32(wide)), lax.rem(tile, jnp.int32(wide))
    return lax.div(rest, jnp.int32(high)), lax.rem(rest, jnp.int32(high)), column

  def kernel(w_g, plain_g, scale_g, turned_g, turned_scale_g, *scratch):
    w_s, plain_s, turned_s, most_s, number_s, full, met = scratch

    def bring(tile, pair, slot):
      e, row, column = where(tile)
      at = w_g.at[e, aligned(row), aligned(column)]
      plgpu.copy_gmem_to_smem(at, w_s.at[pair, slot], full.at[pair, slot])

    def work(tile, pair, side, slot, odd, meet):
      plgpu.barrier_wait(full.at[pair, slot])
      w = plgpu.load(w_s.at[pair, slot, :, aligned(side, HALF)], layout=LAYOUT)
      w = (w if via is None else w.astype(via)).astype(jnp.float32)
      store_warps_largest(most_s, magnitude(w), pair * 2 + odd, side, native=native)
      meet()
      warps = [most_s[pair * 2 + odd, n] for n in range(8)]
      largest = jnp.full((TILE,), functools.reduce(jnp.maximum, warps))
      # the same number for each thread
      found = scale_and_inverse(plgpu.layout_cast(largest, LINE), fmt)
      number_s[pair, side, 0], number_s[pair, side, 1] = found
      # the last tile's results have left
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      settle()
      values = (w * number_s[pair, side, 1, 0]).astype(dtype)
      plain_s[pair, side] = values
      store_transposed(turned_s, values, pair * 2 + side, native=native)
      settle()

      e, row, column = where(tile)
      own = aligned(column * 2 + side, HALF)
      plgpu.copy_smem_to_gmem(plain_s.at[pair, side], plain_g.at[e, aligned(row), own])
      plgpu.copy_smem_to_gmem(turned_s.at[pair * 2 + side], turned_g.at[e, own, aligned(row)])

      @pl.when(side == 0)
      def _():
        scale = number_s[pair, 0, 0, 0]
        scale_g[e, row, column] = scale
        turned_scale_g[e, column, row] = scale

    each_tile(num * high * wide, pairs=pairs, stages=stages, met=met, bring=bring, work=work)

  array = jax.ShapeDtypeStruct
  found = launch(
    kernel,
    'quantize_blocks',
    pairs=pairs,
    out=(
      array((num, d, f), dtype),
      array((num, high, wide), jnp.float32),
      array((num, f, d), dtype),
      array((num, wide, high), jnp.float32),
    ),
    scratch=(
      plgpu.SMEM((pairs, stages, TILE, TILE), w_EDF.dtype),
      plgpu.SMEM((pairs, 2, TILE, HALF), dtype),
      plgpu.SMEM((pairs * 2, HALF, TILE), dtype, transforms=COLUMNS),
      plgpu.SMEM((pairs * 2, 8), jnp.int32),
      plgpu.SMEM((pairs, 2, 2, TILE), jnp.float32),
      plgpu.Barrier(num_arrivals=1, num_barriers=(pairs, stages)),
      plgpu.Barrier(num_arrivals=2, num_barriers=pairs),
    ),
  )(w_EDF)
  _, *found = match_vma(w_EDF, *found)
  return Quantized(*found[:2]), Quantized(*found[2:])
