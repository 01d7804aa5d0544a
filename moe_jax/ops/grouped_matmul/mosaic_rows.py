"""Hopper kernel: every expert's rows times its matrix (forward, and the gradient in x).

  tile         128 rows x 256 columns of y (or 256 x 128), all from one expert; K in steps of 64
  block        one per SM, persistent: 2 warpgroups multiply half of the rows each, with the sums
               in registers, and a third only issues TMA loads into a ring of stages, running
               ahead across tiles
  pair         two blocks side by side in one row of tiles, a cluster: each loads half of their
               common x and multicasts it
  order        strips of some tile rows by all columns, so the tiles in flight at one time share
               their rows of x and their expert in L2
  gathered     x may be rows that an index names: then the loading warpgroup copies them itself
               (mosaic_gather.py), and blocks are not paired

Groups start anywhere. A tile starts at the last multiple of 8 rows (TMA's grain in this layout) at
or before its group, so it may hold a few rows of the neighbours; they are multiplied and not
stored. A slab of 64 rows that are all real leaves through swizzled shared memory; others through
an unswizzled copy, in pieces of 64, 32, .. 1 rows. A warpgroup whose half has no real rows does not
multiply.

Traffic from device memory: x and y once, and a group's weights once, as long as a strip's working
set stays in L2. From L2 into shared memory, m n / (m + n) operations a byte: 85, or 105 in pairs.
Bound: the tensor cores under the chip's power limit; then, at small K, the time from one tile's
last product to the next one's first. 64 experts of 1024 rows also multiply about 3% of rows that
are not stored, and the last of 32 or so rounds of tiles is mostly empty.
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
  Launch,
  ring_slot,
  running_sum,
  smem_layout,
  strip_order,
)
from moe_jax.ops.grouped_matmul.mosaic_gather import Gather
from moe_jax.ops.grouped_matmul.tiles import Tile

# columns of a cut slab that leave at a time: TMA wants each row to start on 128 bytes
_EDGE_COLUMNS = 64


class Work(NamedTuple):
  """Tiles of rows in order of execution; row numbers within a tile count from `base`."""

  # [W, 5]: expert, base, and lo, live, own: rows [lo, live) are real, [live, own) are zeros
  tile_W: jax.Array
  count_1: jax.Array


def plan(num_rows: int, offsets_E: jax.Array, sizes_E: jax.Array, tile_m: int) -> Work:
  """Sums over masks instead of cumsum, searchsorted and gathers: two small kernels, not ten."""
  num_experts = sizes_E.shape[0]
  next_E = jnp.append(offsets_E[1:], num_rows)
  base_E = offsets_E // 8 * 8
  count_E = jnp.where(next_E > offsets_E, -(-(next_E - base_E) // tile_m), 0)
  last_E = running_sum(count_E)
  first_E = last_E - count_E
  end_E = jnp.minimum(offsets_E + sizes_E, next_E)

  # every expert may waste a tile less a row, and up to 7 rows before its start
  w = (num_rows + num_experts * (tile_m + 6)) // tile_m
  tile_W1 = jnp.arange(w, dtype=jnp.int32)[:, None]
  base_WE = base_E + (tile_W1 - first_E) * tile_m
  inside = lambda row_E: (row_E - base_WE).clip(0, tile_m)
  expert_WE = jnp.broadcast_to(jnp.arange(num_experts), base_WE.shape)
  rows = (expert_WE, base_WE, inside(offsets_E), inside(end_E), inside(next_E))
  mine_WE = (tile_W1 >= first_E) & (tile_W1 < last_E)
  tile_W5 = jnp.where(mine_WE[:, :, None], jnp.stack(rows, axis=-1), 0).sum(1, dtype=jnp.int32)
  return Work(tile_W5, last_E[-1:])


def rows_matmul(
  x_RK: jax.Array,
  w: jax.Array,
  work: Work,
  *,
  tile: Tile,
  transpose_w: bool,
  token_R: jax.Array | None = None,
  native: bool = True,
) -> jax.Array:
  """w is [E, K, N], or [E, N, K] with transpose_w.

  With token_R the rows are those of x[token_R], which is never in memory. `native` is False in the
  interpreter.
  """
  k, n = x_RK.shape[1], w.shape[1 if transpose_w else 2]
  num_rows = (x_RK if token_R is None else token_R).shape[0]
  gather = None
  if token_R is not None:
    assert tile.pair == 1
    gather = Gather(tile.m, tile.k, tile.stages, native)
  steps, full_n, rest_n = k // tile.k, n // tile.n, n % tile.n
  columns = full_n + (rest_n > 0)
  w_tile = (tile.n, tile.k) if transpose_w else (tile.k, tile.n)
  half = tile.m // 2
  launch = Launch(tile.pair)

  def kernel(x_g, w_g, tile_g, count_g, *refs):
    token_g = refs[0] if gather else None
    y_g, x_s, w_s, y_s, edge_s, full, empty, *gathered = refs[1 if gather else 0 :]
    group = lax.axis_index('warpgroup')
    tile_rows = count_g[0]
    total = tile_rows * pl.cdiv(columns, tile.pair)
    my_tiles = launch.share(total)

    def where(i):
      """Column, then expert, base, lo, live, own of this block's i-th tile."""
      at = lax.min(launch.index(i), total - 1)
      m, pair_column = strip_order(at, tile_rows, pl.cdiv(columns, tile.pair), tile.strip)
      return launch.of_pair(pair_column), *(tile_g[m, c] for c in range(5))

    steps_of = lambda lo, live: jnp.where(live > lo, steps, 0)

    def wait_full(step):
      slot = ring_slot(step, tile.stages)
      plgpu.barrier_wait(full.at[slot])
      if gather:
        gather.wait(gathered, slot, lax.div(step, jnp.int32(tile.stages)))
      return slot

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(224 if gather else 232, action='increase')
      first = group * half
      if gather:
        gather.wait_ready(gathered)

      def multiply(i, carry):
        done, (column, _, base, lo, live, own) = carry
        # before the products, which hide the latency of these loads and divisions
        upcoming = where(i + 1)
        todo = steps_of(lo, live)
        # the last column of a pair may not exist
        mine = (column < columns) & (live > first) & (lo < first + half)

        def pass_by(k, _):
          plgpu.barrier_arrive(empty.at[wait_full(done + k)])

        lax.fori_loop(0, jnp.where(mine, 0, todo), pass_by, None)
        todo_mine = jnp.where(mine, todo, 0)

        def one_width(width):
          def accumulate(acc):
            def step(k, _):
              slot = wait_full(done + k)
              w_slot = w_s.at[slot, :width].T if transpose_w else w_s.at[slot, :, :width]
              plgpu.wgmma(acc, x_s.at[slot, pl.ds(first, half)], w_slot)
              # all but the newest are complete, so the slot before this one is free
              plgpu.wgmma_wait(1)

              @pl.when(k > 0)
              def _():
                plgpu.barrier_arrive(empty.at[ring_slot(done + k - 1, tile.stages)])

            lax.fori_loop(0, todo_mine, step, None)
            sums = acc[...]

            @pl.when(todo_mine > 0)
            def _():
              plgpu.barrier_arrive(empty.at[ring_slot(done + steps - 1, tile.stages)])

            return sums

          sums = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((half, width), jnp.float32))
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          for slab in range(half // SLAB):
            start = slab * SLAB
            edges = (edge - first - start for edge in (lo, live, own))
            y = sums[start : start + SLAB]
            store(y, slab, pl.multiple_of(base + first + start, 8), column, *edges)

        # the last column of tiles may be narrower, and a width must be static
        if full_n:
          pl.when(column < full_n)(lambda: one_width(tile.n))
        if rest_n:
          pl.when(column == full_n)(lambda: one_width(rest_n))
        return done + todo, upcoming

      def store(y, slab, row, column, lo, live, own):
        """Rows [lo, live) of a slab as they are, [live, own) as zeros, others not at all."""
        all_real = (lo <= 0) & (live >= SLAB)

        @pl.when(all_real)
        def _():
          y_s[group, slab, :, : y.shape[1]] = y.astype(y_g.dtype)
          plgpu.commit_smem()
          # past column N, TMA drops what it is given
          at = pl.ds(row, SLAB), pl.ds(column * tile.n, tile.n)
          plgpu.copy_smem_to_gmem(y_s.at[group, slab], y_g.at[at])

        begin = lax.max(lo, 0)
        size = lax.min(own, SLAB) - begin

        @pl.when(jnp.logical_not(all_real) & (size > 0))
        def _():
          index = plgpu.broadcasted_iota(jnp.int32, (SLAB,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
          real = (index < live).astype(jnp.float32)
          keep = lax.broadcast_in_dim(real, (SLAB, _EDGE_COLUMNS), [0]) > 0
          for c in range(0, y.shape[1], _EDGE_COLUMNS):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            # a select: a row of nobody may have come out as NaN
            part = jnp.where(keep, y[:, c : c + _EDGE_COLUMNS], 0)
            edge_s[group] = part.astype(y_g.dtype)
            plgpu.commit_smem()
            at_column = pl.ds(column * tile.n + c, _EDGE_COLUMNS)
            at = begin
            for piece in (64, 32, 16, 8, 4, 2, 1):

              @pl.when((size & piece) != 0)
              def _(at=at, piece=piece, at_column=at_column):
                plgpu.copy_smem_to_gmem(
                  edge_s.at[group, pl.ds(at, piece)], y_g.at[pl.ds(row + at, piece), at_column]
                )

              at += size & piece

      lax.fori_loop(0, my_tiles, multiply, (jnp.int32(0), where(jnp.int32(0))))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(56 if gather else 40, action='decrease')
      if gather:
        gather.make_ready(gathered)

      def load(i, done):
        column, expert, base, lo, live, _ = where(i)
        todo = steps_of(lo, live)
        # past row R or column N, TMA writes zeros and moves nothing
        at_m, at_n = pl.ds(pl.multiple_of(base, 8), tile.m), pl.ds(column * tile.n, tile.n)

        held = gather.hold(token_g, base) if gather else None

        def step(k, _):
          slot = ring_slot(done + k, tile.stages)

          @pl.when(done + k >= tile.stages)
          def _():
            plgpu.barrier_wait(empty.at[slot])

          at_k = pl.ds(k * tile.k, tile.k)
          source = w_g.at[expert, at_n, at_k] if transpose_w else w_g.at[expert, at_k, at_n]
          plgpu.copy_gmem_to_smem(source, w_s.at[slot], full.at[slot])
          if gather:
            gather.start(x_g, token_g, held, x_s, gathered, column=k * tile.k, slot=slot)
          else:
            plgpu.copy_gmem_to_smem(
              x_g.at[at_m, at_k], x_s.at[slot], full.at[slot], collective_axes=launch.multicast
            )

        lax.fori_loop(0, todo, step, None)
        return done + todo

      done = lax.fori_loop(0, my_tiles, load, jnp.int32(0))
      # the last releases must have arrived before the block, and its barriers, may end
      drain = lambda k, _: plgpu.barrier_wait(empty.at[ring_slot(k, tile.stages)])
      lax.fori_loop(lax.max(done - tile.stages, 0), done, drain, None)
      if gather:
        gather.drain()

  return launch.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((num_rows, n), x_RK.dtype),
    scratch_types=(
      plgpu.SMEM((tile.stages, tile.m, tile.k), x_RK.dtype, transforms=smem_layout(tile.k)),
      plgpu.SMEM((tile.stages, *w_tile), w.dtype, transforms=smem_layout(64)),
      plgpu.SMEM((2, half // SLAB, SLAB, tile.n), x_RK.dtype, transforms=smem_layout(64)),
      plgpu.SMEM((2, SLAB, _EDGE_COLUMNS), x_RK.dtype),
      plgpu.Barrier(num_arrivals=1 if gather else 2, num_barriers=tile.stages),
      launch.barrier(num_arrivals=2, num_barriers=tile.stages),
      *(gather.scratch() if gather else ()),
    ),
    name='grouped_matmul_dgrad' if transpose_w else 'grouped_matmul',
  )(x_RK, w, *work, *(() if token_R is None else (token_R,)))
