"""Hopper kernel: every expert's rows times its matrix (forward, and the gradient in x).

  tile         128 rows x 256 columns of y, all from one expert; K in steps of 64
  block        one per SM, takes every 132nd tile: 2 warpgroups multiply 64 x 256 each, with the
               sums in registers, and a third only issues TMA loads into a ring of 4 stages,
               running ahead across tiles
  order        strips of some tile rows by all columns, so the tiles in flight at one time share
               their rows of x and their expert in L2

Groups start anywhere. A tile starts at the last multiple of 8 rows (TMA's grain in this layout) at
or before its group, so it may hold a few rows of the neighbours; they are multiplied and not
stored. A slab of 64 rows that its expert owns whole leaves through swizzled shared memory; others
through an unswizzled copy, in pieces of 32, 16, .. 1 rows. A slab without real rows is not
multiplied, so a group wastes at most 63 rows of arithmetic, and about 32 on average.

Traffic from device memory: x and y once, and a group's weights once, as long as a strip's working
set stays in L2; from L2, (128 + 256) * 64 elements for 128 * 256 * 64 products, 85 operations a
byte. Bound: the tensor cores, which the chip's power limit holds near 790 TFLOP/s.
"""

# R rows  K contracted  N columns of y  E experts  W tiles of rows

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.grouped_matmul.mosaic_common import (
  SLAB,
  num_sms,
  ring_slot,
  smem_layout,
  strip_order,
)
from moe_jax.ops.grouped_matmul.tiles import Tile

# columns that leave at a time: of a whole slab, and of one that is cut. TMA wants a piece to start
# at 128 bytes, so a row of the second has that; 64 for both would not leave room for four stages.
_CHUNK, _EDGE_CHUNK = 32, 64


class Work(NamedTuple):
  """Tiles of rows in order of execution; row numbers within a tile count from `base`."""

  # [W, 5]: expert, base, and lo, live, own: rows [lo, live) are real, [live, own) are zeros
  tile_W: jax.Array
  count_1: jax.Array


def plan(num_rows: int, offsets_E: jax.Array, sizes_E: jax.Array, tile_m: int) -> Work:
  num_experts = sizes_E.shape[0]
  next_E = jnp.append(offsets_E[1:], num_rows)
  base_E = offsets_E // 8 * 8
  count_E = jnp.where(next_E > offsets_E, -(-(next_E - base_E) // tile_m), 0)
  last_E = jnp.cumsum(count_E)
  # every expert may waste a tile less a row, and up to 7 rows before its start
  w = (num_rows + num_experts * (tile_m + 6)) // tile_m
  expert_W = jnp.sum(jnp.arange(w)[:, None] >= last_E, axis=1).clip(0, num_experts - 1)
  base_W = (base_E + (jnp.arange(w)[:, None] - (last_E - count_E)) * tile_m)[
    jnp.arange(w), expert_W
  ]
  inside = lambda row_E: (row_E[expert_W] - base_W).clip(0, tile_m)
  rows = (inside(offsets_E), inside(jnp.minimum(offsets_E + sizes_E, next_E)), inside(next_E))
  return Work(jnp.stack([expert_W, base_W, *rows], axis=1).astype(jnp.int32), last_E[-1:])


def rows_matmul(
  x_RK: jax.Array, w: jax.Array, work: Work, *, tile: Tile, transpose_w: bool
) -> jax.Array:
  """w is [E, K, N], or [E, N, K] with transpose_w."""
  (num_rows, k), n = x_RK.shape, w.shape[1 if transpose_w else 2]
  steps, full_n, rest_n = k // tile.k, n // tile.n, n % tile.n
  columns = full_n + (rest_n > 0)
  sms = num_sms()
  w_tile = (tile.n, tile.k) if transpose_w else (tile.k, tile.n)
  slabs = tile.m // 2 // SLAB

  def kernel(x_g, w_g, tile_g, count_g, y_g, x_s, w_s, y_s, edge_s, full, empty):
    group = lax.axis_index('warpgroup')
    sm = lax.axis_index('sm')
    tile_rows = count_g[0]
    my_tiles = pl.cdiv(lax.max(tile_rows * columns - sm, 0), sms)

    def where(i):
      m, column = strip_order(sm + i * sms, tile_rows, columns, tile.strip)
      expert, base, lo, live, own = (tile_g[m, c] for c in range(5))
      return column, expert, pl.multiple_of(base, 8), lo, live, own

    def each_width(column, body):
      """The last column of tiles may be narrower; its width must be static."""
      if full_n:
        pl.when(column < full_n)(lambda: body(tile.n))
      if rest_n:
        pl.when(column == full_n)(lambda: body(rest_n))

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(232, action='increase')
      first = group * (tile.m // 2)
      rows = pl.ds(first, tile.m // 2)

      def multiply(i, done):
        column, _, base, lo, live, own = where(i)
        todo = jnp.where(live > lo, steps, 0)
        mine = (live > first) & (lo < first + tile.m // 2)

        def one_width(width):
          def accumulate(acc):
            def step(k, _):
              slot = ring_slot(done + k, tile.stages)
              plgpu.barrier_wait(full.at[slot])
              w_slot = w_s.at[slot, :width].T if transpose_w else w_s.at[slot, :, :width]
              plgpu.wgmma(acc, x_s.at[slot, rows], w_slot)
              # all but the newest are complete, so the slot before this one is free
              plgpu.wgmma_wait(1)

              @pl.when(k > 0)
              def _():
                plgpu.barrier_arrive(empty.at[ring_slot(done + k - 1, tile.stages)])

            def pass_by(k, _):
              slot = ring_slot(done + k, tile.stages)
              plgpu.barrier_wait(full.at[slot])
              plgpu.barrier_arrive(empty.at[slot])

            lax.fori_loop(0, jnp.where(mine, todo, 0), step, None)
            total = acc[...]

            @pl.when(mine & (todo > 0))
            def _():
              plgpu.barrier_arrive(empty.at[ring_slot(done + steps - 1, tile.stages)])

            lax.fori_loop(0, jnp.where(mine, 0, todo), pass_by, None)
            return total

          total = pl.run_scoped(
            accumulate, plgpu.WGMMAAccumulatorRef((tile.m // 2, width), jnp.float32)
          )
          for slab in range(slabs):
            store(
              total[slab * SLAB : (slab + 1) * SLAB],
              base + first + slab * SLAB,
              column * tile.n,
              *(edge - first - slab * SLAB for edge in (lo, live, own)),
            )

        each_width(column, one_width)
        return done + todo

      def store(y, row, column, lo, live, own):
        """Rows [lo, live) of a slab as they are, [live, own) as zeros, others not at all."""
        whole = (lo <= 0) & (own >= SLAB)
        index = plgpu.broadcasted_iota(jnp.int32, (SLAB,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        real = (index < live).astype(jnp.float32)

        def chunk(c, size):
          part = y[:, c * size : (c + 1) * size]
          # a select: a row of nobody may have come out as NaN
          keep = lax.broadcast_in_dim(real, part.shape, [0]) > 0
          return jnp.where(keep, part, 0).astype(y_g.dtype)

        @pl.when(whole)
        def _():
          for c in range(y.shape[1] // _CHUNK):
            plgpu.wait_smem_to_gmem(min(c, 1), wait_read_only=True)
            y_s[group, c % 2] = chunk(c, _CHUNK)
            plgpu.commit_smem()
            at = pl.ds(row, SLAB), pl.ds(column + c * _CHUNK, _CHUNK)
            plgpu.copy_smem_to_gmem(y_s.at[group, c % 2], y_g.at[at])

        start = lax.max(lo, 0)
        size = lax.min(own, SLAB) - start

        @pl.when(jnp.logical_not(whole) & (size > 0))
        def _():
          for c in range(y.shape[1] // _EDGE_CHUNK):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            edge_s[group] = chunk(c, _EDGE_CHUNK)
            plgpu.commit_smem()
            at_column = pl.ds(column + c * _EDGE_CHUNK, _EDGE_CHUNK)
            at = start
            for piece in (32, 16, 8, 4, 2, 1):

              @pl.when((size & piece) != 0)
              def _(at=at, piece=piece, at_column=at_column):
                plgpu.copy_smem_to_gmem(
                  edge_s.at[group, pl.ds(at, piece)],
                  y_g.at[pl.ds(row + at, piece), at_column],
                )

              at += size & piece

      lax.fori_loop(0, my_tiles, multiply, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(40, action='decrease')

      def load(i, done):
        column, expert, base, lo, live, _ = where(i)
        todo = jnp.where(live > lo, steps, 0)

        # a last, narrower tile reads past column N, which TMA turns into zeros and no traffic
        at_n = pl.ds(column * tile.n, tile.n)

        def step(k, _):
          slot = ring_slot(done + k, tile.stages)

          @pl.when(done + k >= tile.stages)
          def _():
            plgpu.barrier_wait(empty.at[slot])

          at_k = pl.ds(k * tile.k, tile.k)
          source = w_g.at[expert, at_n, at_k] if transpose_w else w_g.at[expert, at_k, at_n]
          plgpu.copy_gmem_to_smem(x_g.at[pl.ds(base, tile.m), at_k], x_s.at[slot], full.at[slot])
          plgpu.copy_gmem_to_smem(source, w_s.at[slot], full.at[slot])

        lax.fori_loop(0, todo, step, None)
        return done + todo

      done = lax.fori_loop(0, my_tiles, load, jnp.int32(0))
      # the last releases must have arrived before the block, and its barriers, may end
      drain = lambda k, _: plgpu.barrier_wait(empty.at[ring_slot(k, tile.stages)])
      lax.fori_loop(lax.max(done - tile.stages, 0), done, drain, None)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((num_rows, n), x_RK.dtype),
    scratch_types=(
      plgpu.SMEM((tile.stages, tile.m, tile.k), x_RK.dtype, transforms=smem_layout(tile.k)),
      plgpu.SMEM((tile.stages, *w_tile), w.dtype, transforms=smem_layout(64)),
      plgpu.SMEM((2, 2, SLAB, _CHUNK), x_RK.dtype, transforms=smem_layout(_CHUNK)),
      plgpu.SMEM((2, SLAB, _EDGE_CHUNK), x_RK.dtype),
      plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
    ),
    grid=(sms,),
    grid_names=('sm',),
    num_threads=3,
    thread_name='warpgroup',
    kernel_name='grouped_matmul_dgrad' if transpose_w else 'grouped_matmul',
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(x_RK, w, *work)
