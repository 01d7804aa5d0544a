"""Hopper kernel in FP8: every expert's rows times its matrix, both e4m3 with float32 scales.

  y[r, n] = sum over blocks b of 128 k:
            (x[r, b] . w[e, n, b]) * x_scale[b, r] * w_scale[e, n/128, b]

The pipeline is that of mosaic_fp8.py, the order of tiles that of mosaic_rows.py. Groups start on
multiples of 128 rows, so no slab of 64 rows belongs to two experts, and every slab leaves whole.
FP8 operands of wgmma must both be contiguous along K, hence w is [E, N, K]. No pairs: blocks that
shared x were level or slower, and one case of 64 uneven groups never ended, for a reason not found.

Two units are in flight: a warpgroup multiplies its next one while it promotes the last, with
registers for both and the sums, 192 of 232. Bound: products of 128 columns, whose operands both
come from shared memory, reach 60% of the tensor cores' peak at full clock, promoted or not; then
the power limit.
"""

# R rows  K contracted  N columns of y  E experts  B blocks of 128 along K

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.grouped_matmul import mosaic_fp8
from moe_jax.ops.grouped_matmul.mosaic_common import SLAB, Launch, smem_layout, strip_order
from moe_jax.ops.grouped_matmul.mosaic_fp8 import BLOCK, ROUND
from moe_jax.ops.grouped_matmul.mosaic_rows import Work
from moe_jax.ops.grouped_matmul.tiles import Tile

# what TMA writes starts on 128 bytes
_TMA_FLOATS = 32
# columns that leave at a time: all of a tile may be on their way
_CHUNK = 64
_BUFFERS = BLOCK // _CHUNK


def rows_matmul(
  x_RK: jax.Array,
  x_scale_BR: jax.Array,
  w_ENK: jax.Array,
  w_scale_ENB: jax.Array,
  work: Work,
  *,
  tile: Tile,
  dtype: jnp.dtype,
) -> jax.Array:
  """w_scale is [E, N/128, K/128]; `work` is of tiles of 128 rows."""
  (num_rows, k), n = x_RK.shape, w_ENK.shape[1]
  blocks, columns = k // BLOCK, n // BLOCK
  launch = Launch(pair=1)
  # TMA faults at a start that is not on 16 bytes: each row of scales takes whole rounds
  whole_rounds = -(-blocks // ROUND) * ROUND
  pad = (0, 0), (0, 0), (0, whole_rounds - blocks)
  w_scale_ENB = jnp.pad(w_scale_ENB, pad)
  # unrolled rounds and a loop for the rest together spill registers; up to a tenth of blocks of
  # zeros cost less than what a loop loses
  overlap = whole_rounds * 10 <= blocks * 11
  if overlap:
    blocks = whole_rounds

  def kernel(x_g, sx_g, w_g, sw_g, tile_g, count_g, y_g, pipe, y_s):
    group = lax.axis_index('warpgroup')
    tile_rows = count_g[0]
    total = tile_rows * columns
    my_tiles = launch.share(total)

    def where(i):
      """Column, then expert, base, live, own of this block's i-th tile."""
      at = lax.min(launch.index(i), total - 1)
      m, column = strip_order(at, tile_rows, columns, tile.strip)
      return column, *(tile_g[m, c] for c in (0, 1, 3, 4))

    blocks_of = lambda live: jnp.where(live > 0, blocks, 0).astype(jnp.int32)

    @pl.when(group < 2)
    def _():
      launch.set_registers(multiplies=True)
      first = group * SLAB
      zeros = lambda: plgpu.layout_cast(jnp.zeros((SLAB, BLOCK), jnp.float32), plgpu.Layout.WGMMA)

      def promote(sums, product, slot, block):
        x_scale = plgpu.load(
          pipe.scales_s['x'].at[slot, block, pl.ds(first, SLAB)],
          layout=plgpu.Layout.WGMMA.reduce(1),
        )
        scale = x_scale * pipe.scales_s['w'][slot, block]
        return sums + product * lax.broadcast_in_dim(scale, product.shape, [0])

      def multiply(i, carry):
        done, (column, _, base, live, own) = carry
        # before the products, which hide the latency of these loads and divisions
        upcoming = where(i + 1)
        todo = blocks_of(live)
        mine = live > first

        @pl.when(mine)
        def _():
          sums = _contract(pipe, done, todo, zeros(), promote, overlap=overlap)
          store(sums, base, column, live, own)

        @pl.when(jnp.logical_not(mine))
        def _():
          _pass_by(pipe, done, todo)
          store(zeros(), base, column, live, own)

        return done.after(todo), upcoming

      def store(y, base, column, live, own):
        """Rows before `live` as they are, those before `own` as zeros, others not at all."""

        def send(y):
          for i, c in enumerate(range(0, BLOCK, _CHUNK)):
            buffer = y_s.at[group, i % _BUFFERS]
            plgpu.wait_smem_to_gmem(min(i, _BUFFERS - 1), wait_read_only=True)
            buffer[...] = y[:, c : c + _CHUNK].astype(dtype)
            plgpu.commit_smem()
            # past row R, TMA drops what it is given
            at_row = pl.ds(pl.multiple_of(base + first, SLAB), SLAB)
            plgpu.copy_smem_to_gmem(buffer, y_g.at[at_row, pl.ds(column * BLOCK + c, _CHUNK)])

        pl.when((first < own) & (live >= first + SLAB))(lambda: send(y))

        @pl.when((first < own) & (live < first + SLAB))
        def _():
          index = plgpu.broadcasted_iota(jnp.int32, (SLAB,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
          real = (index < live - first).astype(jnp.float32)
          # a select: a row of nobody may have come out as NaN
          send(jnp.where(lax.broadcast_in_dim(real, y.shape, [0]) > 0, y, 0))

      lax.fori_loop(0, my_tiles, multiply, (mosaic_fp8.start(), where(jnp.int32(0))))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      launch.set_registers(multiplies=False)

      def load(i, done):
        column, expert, base, live, _ = where(i)
        at_m = pl.ds(pl.multiple_of(base, SLAB), tile.m)
        at_n = pl.ds(column * BLOCK, BLOCK)

        # past row R or column K, TMA writes zeros and moves nothing
        def operands(block):
          at_k = pl.ds(block * BLOCK, BLOCK)
          return x_g.at[at_m, at_k], w_g.at[expert, at_n, at_k]

        def copy_scales(block, slot, ready):
          of_x = sx_g.at[pl.ds(block, ROUND), at_m]
          of_w = sw_g.at[pl.ds((expert * columns + column) * whole_rounds + block, _TMA_FLOATS)]
          plgpu.copy_gmem_to_smem(of_x, pipe.scales_s['x'].at[slot], ready)
          plgpu.copy_gmem_to_smem(of_w, pipe.scales_s['w'].at[slot], ready)

        mosaic_fp8.load(pipe, done, blocks_of(live), operands, copy_scales)
        return done.after(blocks_of(live))

      mosaic_fp8.drain(pipe, lax.fori_loop(0, my_tiles, load, mosaic_fp8.start()))

  scales = {
    'x': plgpu.SMEM((2, ROUND, tile.m), jnp.float32),
    'w': plgpu.SMEM((2, _TMA_FLOATS), jnp.float32),
  }
  return launch.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((num_rows, n), dtype),
    scratch_types=(
      mosaic_fp8.scratch(launch, x_RK.dtype, BLOCK, scales),
      plgpu.SMEM(
        (2, _BUFFERS, SLAB, _CHUNK),
        dtype,
        transforms=smem_layout(_CHUNK, dtype.itemsize),
      ),
    ),
    name='grouped_matmul_fp8',
  )(x_RK, x_scale_BR, w_ENK, w_scale_ENB.reshape(-1), *work)


def _contract(
  pipe: mosaic_fp8.Pipe,
  done: mosaic_fp8.Progress,
  num_blocks: jax.Array,
  sums: Any,
  promote: Callable[[Any, jax.Array, jax.Array, jax.Array | int], Any],
  *,
  overlap: bool,
) -> Any:
  """Multiplies all blocks of a tile: sums = promote(sums, product, slot and index of scales).

  overlap: the next unit is multiplied during a promotion; needs registers for both, and a number
    of blocks that makes whole rounds.
  """
  rows = pl.ds(lax.axis_index('warpgroup') * SLAB, SLAB)

  def finish(sums, slot, acc, scale_slot, in_flight):
    product = plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)
    plgpu.barrier_arrive(pipe.empty.at[slot])
    return promote(sums, product, scale_slot, slot)

  def issue(slots, sums, scale_slot, pending: Any):
    """Multiplies what is in these slots; `pending` is the unit in flight."""
    if not slots:
      return finish(sums, pending[0], pending[1], scale_slot, 0) if pending else sums
    slot, *others = slots
    plgpu.barrier_wait(pipe.full.at[slot])

    def multiply(acc):
      plgpu.wgmma(acc, pipe.a_s.at[slot, rows], pipe.b_s.at[slot].T)
      if not overlap:
        return finish(sums, slot, acc, scale_slot, 0)
      finished = finish(sums, pending[0], pending[1], scale_slot, 1) if pending else sums
      return issue(others, finished, scale_slot, (slot, acc))

    new = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((SLAB, BLOCK), jnp.float32))
    return new if overlap else issue(others, new, scale_slot, None)

  def one_round(r, slots, sums):
    scale_slot = lax.rem(done.rounds + r, jnp.int32(2))
    plgpu.barrier_wait(pipe.scales_full.at[scale_slot])
    if isinstance(slots, list):
      sums = issue(slots, sums, scale_slot, None)
    else:
      sums = lax.fori_loop(0, slots, lambda u, sums: issue([u], sums, scale_slot, None), sums)
    plgpu.commit_smem()
    plgpu.barrier_arrive(pipe.scales_empty.at[scale_slot])
    return sums

  if overlap:
    whole = lax.div(num_blocks, jnp.int32(ROUND))
    return lax.fori_loop(0, whole, lambda r, sums: one_round(r, [*range(ROUND)], sums), sums)
  some = lambda r, sums: one_round(r, lax.min(num_blocks - r * ROUND, ROUND), sums)
  return lax.fori_loop(0, mosaic_fp8.num_rounds(num_blocks), some, sums)


def _pass_by(pipe: mosaic_fp8.Pipe, done: mosaic_fp8.Progress, num_blocks: jax.Array) -> None:
  """For a warpgroup with nothing to multiply in a tile; releases in the order of `_contract`."""

  def block(slot, _):
    plgpu.barrier_wait(pipe.full.at[slot])
    plgpu.barrier_arrive(pipe.empty.at[slot])

  def one_round(r, _):
    scale_slot = lax.rem(done.rounds + r, jnp.int32(2))
    plgpu.barrier_wait(pipe.scales_full.at[scale_slot])
    lax.fori_loop(0, lax.min(num_blocks - r * ROUND, ROUND), block, None)
    plgpu.barrier_arrive(pipe.scales_empty.at[scale_slot])

  lax.fori_loop(0, mosaic_fp8.num_rounds(num_blocks), one_round, None)
