"""Hopper kernel: the gradient in the weights, dw[e] = x[rows of e].T @ dy[rows of e].

  tile         128 rows x 256 columns of one dw[e]; contracts the expert's rows, 64 at a step
  block        as in mosaic_rows.py: 2 warpgroups multiply 64 x 256 each, a third loads
  pair         two blocks, one tile above the other, which share their part of dy
  order        expert by expert; within one, strips of some tile rows by all columns
  gathered     x or dy may be rows that an index names, as in mosaic_rows.py

An expert's steps start at the last multiple of 8 rows at or before its group, and the last step
may run past its end. In those two steps each warpgroup sets the foreign rows of its part of x to
zero in shared memory before it multiplies, hidden behind the products in flight. Zero times a
neighbour's row is zero; but zero times a row of nobody may be NaN, so where such rows are in reach
dy is cleaned too, which makes the two warpgroups wait for each other.

Traffic from device memory: an expert's x and dy once, as long as both stay in L2, and dw once,
which with float32 gradients and a thousand rows an expert is most of it. Bound: the tensor cores;
then, with few rows an expert, the stores of dw between one tile's products and the next's.
"""

# R rows  D rows of dw  F columns of dw  E experts

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.grouped_matmul.mosaic_common import (
  SLAB,
  Launch,
  ring_slot,
  smem_layout,
  strip_order,
)
from moe_jax.ops.grouped_matmul.mosaic_gather import Gather
from moe_jax.ops.grouped_matmul.tiles import Tile


def plan(num_rows: int, offsets_E: jax.Array, sizes_E: jax.Array, tile_k: int) -> jax.Array:
  """[E, 4]: base, and counted from it lo and end, rows [lo, end) are the group; near to nobody."""
  next_E = jnp.append(offsets_E[1:], num_rows)
  end_E = jnp.minimum(offsets_E + sizes_E, next_E)
  base_E = offsets_E // 8 * 8
  # a small expert's only step may reach over several groups, so look at every gap
  reach_E = base_E + -(-(end_E - base_E) // tile_k) * tile_k
  near_EE = (end_E < reach_E[:, None]) & (next_E > base_E[:, None]) & (end_E < next_E)
  rows = (base_E, offsets_E - base_E, end_E - base_E, near_EE.any(axis=1))
  return jnp.stack(rows, axis=1).astype(jnp.int32)


def weights_matmul(
  x_RD: jax.Array,
  dy_RF: jax.Array,
  group_E4: jax.Array,
  *,
  tile: Tile,
  dtype: jnp.dtype,
  into_EDF: jax.Array | None = None,
  token_R: jax.Array | None = None,
  gathers: str = '',
  native: bool = True,
) -> jax.Array:
  """`into` is what to add to, of `dtype`; written in place where nobody else holds it.

  gathers: 'x' or 'dy', whose rows then are those that token_R names, never in memory as such.
  """
  (_, d), f, num_experts = x_RD.shape, dy_RF.shape[1], group_E4.shape[0]
  # the unit of work is a pair of tiles, one above the other, with dy in common
  unit_rows, full_f, rest_f = pl.cdiv(d, tile.m * tile.pair), f // tile.n, f % tile.n
  columns = full_f + (rest_f > 0)
  # 128 bfloat16 or 64 float32 columns leave at a time, through one of two buffers
  chunk = 256 // dtype.itemsize
  launch = Launch(tile.pair)
  num_units = num_experts * unit_rows * columns
  gather = None
  if token_R is not None:
    assert tile.pair == 1 and d % tile.m == 0 and f % tile.n == 0
    gather = Gather(tile.k, tile.m if gathers == 'x' else tile.n, tile.stages, native)

  def kernel(x_g, dy_g, group_g, *refs):
    token_g = refs[0] if gather else None
    dw_g, x_s, dy_s, dw_s, full, empty, clean, *gathered = refs[1 if gather else 0 :]
    group = lax.axis_index('warpgroup')
    my_tiles = launch.share(num_units)

    def where(i):
      """Tile row and column, then expert, base, lo, end, dirty of this block's i-th tile."""
      at = lax.min(launch.index(i), num_units - 1)
      expert = lax.div(at, jnp.int32(unit_rows * columns))
      inside = lax.rem(at, jnp.int32(unit_rows * columns))
      row, column = strip_order(inside, unit_rows, columns, tile.strip)
      return launch.of_pair(row), column, expert, *(group_g[expert, c] for c in range(4))

    steps_of = lambda lo, end: jnp.where(end > lo, pl.cdiv(end, tile.k), 0)

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(224 if gather else 232, action='increase')
      if gather:
        gather.wait_ready(gathered)

      def keep_rows(ref, columns_at, lo, hi):
        """Zeroes rows of a slot outside [lo, hi). A select, since they may hold NaN."""
        part = plgpu.load(ref.at[:, columns_at], layout=plgpu.Layout.WGMMA)
        index = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA)
        ref[:, columns_at] = jnp.where((index >= lo) & (index < hi), part, jnp.zeros_like(part))
        plgpu.commit_smem()

      def store(total, row, column, expert):
        @pl.when(row < d)
        def _():
          for i, c in enumerate(range(0, total.shape[1], chunk)):
            part = total[:, c : c + chunk]
            if into_EDF is not None:
              own = dw_g.at[expert, pl.ds(row, SLAB), pl.ds(column + c, part.shape[1])]
              before = plgpu.load(own, layout=plgpu.Layout.WGMMA, optimized=False)
              part = part + before.astype(jnp.float32)
            plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)
            dw_s[group, i % 2, :, : part.shape[1]] = part.astype(dtype)
            plgpu.commit_smem()
            # past column F, TMA drops what it is given
            at = pl.ds(row, SLAB), pl.ds(column + c, chunk)
            plgpu.copy_smem_to_gmem(dw_s.at[group, i % 2], dw_g.at[expert, *at])

      def multiply(i, carry):
        done, (row, column, expert, _, lo, end, dirty) = carry
        # before the products, which hide the latency of these loads and divisions
        upcoming = where(i + 1)
        steps = steps_of(lo, end)

        def one_width(width):
          def accumulate(acc):
            def step(k, _):
              slot = ring_slot(done + k, tile.stages)
              own = pl.ds(group * SLAB, SLAB)
              lo_k, end_k = lo - k * tile.k, end - k * tile.k
              plgpu.barrier_wait(full.at[slot])
              if gather:
                gather.wait(gathered, slot, lax.div(done + k, jnp.int32(tile.stages)))

              @pl.when((lo_k > 0) | (end_k < tile.k))
              def _():
                keep_rows(x_s.at[slot], own, lo_k, end_k)

                @pl.when(dirty != 0)
                def _():
                  half = pl.ds(group * (tile.n // 2), tile.n // 2)
                  keep_rows(dy_s.at[slot], half, lo_k, end_k)
                  plgpu.barrier_arrive(clean)
                  plgpu.barrier_wait(clean)

              plgpu.wgmma(acc, x_s.at[slot, :, own].T, dy_s.at[slot, :, :width])
              # all but the newest are complete, so the slot before this one is free
              plgpu.wgmma_wait(1)

              @pl.when(k > 0)
              def _():
                plgpu.barrier_arrive(empty.at[ring_slot(done + k - 1, tile.stages)])

            lax.fori_loop(0, steps, step, None)
            total = acc[...]

            @pl.when(steps > 0)
            def _():
              plgpu.barrier_arrive(empty.at[ring_slot(done + steps - 1, tile.stages)])

            return total

          total = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((SLAB, width), jnp.float32))
          store(total, row * tile.m + group * SLAB, column * tile.n, expert)

        if full_f:
          pl.when(column < full_f)(lambda: one_width(tile.n))
        if rest_f:
          pl.when(column == full_f)(lambda: one_width(rest_f))
        return done + steps, upcoming

      lax.fori_loop(0, my_tiles, multiply, (jnp.int32(0), where(jnp.int32(0))))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(56 if gather else 40, action='decrease')
      if gather:
        gather.make_ready(gathered)

      def load(i, done):
        row, column, _, base, lo, end, _ = where(i)
        steps = steps_of(lo, end)

        def step(k, held):
          slot = ring_slot(done + k, tile.stages)
          # before the wait, which hides its latency
          following = gather.hold(token_g, base + (k + 1) * tile.k) if gather else None

          @pl.when(done + k >= tile.stages)
          def _():
            plgpu.barrier_wait(empty.at[slot])

          # past row R, column D or F, TMA writes zeros
          at = pl.ds(pl.multiple_of(base + k * tile.k, 8), tile.k)
          if gathers != 'x':
            x_part = x_g.at[at, pl.ds(row * tile.m, tile.m)]
            plgpu.copy_gmem_to_smem(x_part, x_s.at[slot], full.at[slot])
          if gathers != 'dy':
            dy_part = dy_g.at[at, pl.ds(column * tile.n, tile.n)]
            plgpu.copy_gmem_to_smem(
              dy_part, dy_s.at[slot], full.at[slot], collective_axes=launch.multicast
            )
          if gather and gathers == 'x':
            gather.start(x_g, token_g, held, x_s, gathered, column=row * tile.m, slot=slot)
          elif gather:
            gather.start(dy_g, token_g, held, dy_s, gathered, column=column * tile.n, slot=slot)
          return following

        lax.fori_loop(0, steps, step, gather.hold(token_g, base) if gather else None)
        return done + steps

      done = lax.fori_loop(0, my_tiles, load, jnp.int32(0))
      # the last releases must have arrived before the block, and its barriers, may end
      drain = lambda k, _: plgpu.barrier_wait(empty.at[ring_slot(k, tile.stages)])
      lax.fori_loop(lax.max(done - tile.stages, 0), done, drain, None)
      if gather:
        gather.drain()

  return launch.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((num_experts, d, f), dtype),
    scratch_types=(
      plgpu.SMEM((tile.stages, tile.k, tile.m), x_RD.dtype, transforms=smem_layout(64)),
      plgpu.SMEM((tile.stages, tile.k, tile.n), dy_RF.dtype, transforms=smem_layout(64)),
      plgpu.SMEM((2, 2, SLAB, chunk), dtype, transforms=smem_layout(chunk, dtype.itemsize)),
      plgpu.Barrier(num_arrivals=1 if gather else 2, num_barriers=tile.stages),
      launch.barrier(num_arrivals=2, num_barriers=tile.stages),
      plgpu.Barrier(num_arrivals=2),
      *(gather.scratch() if gather else ()),
    ),
    name='grouped_matmul_wgrad',
    into=into_EDF,
  )(x_RD, dy_RF, group_E4, *(() if token_R is None else (token_R,)))
