"""Hopper kernel in FP8: the gradient in the weights, dw[e] = x[rows of e].T @ dy[rows of e].

  dw[e, d, f] = sum over blocks b of 128 rows of e:
                (x[d, b] . dy[f, b]) * x_scale[b, d] * dy_scale[b, f]

Operands are transposed copies, x [D, R] and dy [F, R], scaled 128 rows at a time, because FP8 wgmma
contracts along what is contiguous. The pipeline is that of mosaic_fp8.py, the order of tiles that
of mosaic_weights.py. Groups start on multiples of 128 rows and rows of no expert hold zeros, so
whole blocks are multiplied and nothing is masked.

  tile         128 x 256 of dw; each of two warpgroups has two units a block, 64 x 128, of which it
               multiplies one at a time: 128 registers for sums and 64 for the product
  turns        the second warpgroup gets a block when the first is done with it, so that one
               promotes, which takes the scales of rows and of columns, while the other multiplies,
               and one stores while the other still has a block to do
  pair         two blocks with tiles one above the other, which multicast their part of dy
"""

# R rows  D rows of dw  F columns of dw  E experts  B blocks of 128 rows

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.grouped_matmul import mosaic_fp8
from moe_jax.ops.grouped_matmul.mosaic_common import SLAB, Launch, smem_layout, strip_order
from moe_jax.ops.grouped_matmul.mosaic_fp8 import BLOCK, ROUND
from moe_jax.ops.grouped_matmul.tiles import Tile

# columns promoted and stored at a time, which keeps few of their scales in registers
_CHUNK = 32


def plan(num_rows: int, offsets_E: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """[E, 2]: first block of rows, number of blocks."""
  next_E = jnp.append(offsets_E[1:], num_rows)
  size_E = jnp.minimum(sizes_E, next_E - offsets_E)
  return jnp.stack((offsets_E // BLOCK, -(-size_E // BLOCK)), axis=1).astype(jnp.int32)


def weights_matmul(
  x_DR: jax.Array,
  x_scale_BD: jax.Array,
  dy_FR: jax.Array,
  dy_scale_BF: jax.Array,
  group_E2: jax.Array,
  *,
  tile: Tile,
  dtype: jnp.dtype,
  into_EDF: jax.Array | None = None,
) -> jax.Array:
  """`into` is what to add to, of `dtype`; written in place where nobody else holds it."""
  d, f, num_experts = x_DR.shape[0], dy_FR.shape[0], group_E2.shape[0]
  # the unit of work is a pair of tiles, one above the other, with dy in common
  unit_rows, columns = pl.cdiv(d, tile.m * tile.pair), pl.cdiv(f, tile.n)
  launch = Launch(tile.pair)
  # columns that leave at a time
  stored = 64 // dtype.itemsize
  num_units = num_experts * unit_rows * columns

  def kernel(x_g, sx_g, dy_g, sy_g, group_g, dw_g, pipe, dw_s):
    group = lax.axis_index('warpgroup')
    my_tiles = launch.share(num_units)

    def where(i):
      """Tile row and column, then expert, first block and number of blocks of the i-th tile."""
      at = lax.min(launch.index(i), num_units - 1)
      expert = lax.div(at, jnp.int32(unit_rows * columns))
      inside = lax.rem(at, jnp.int32(unit_rows * columns))
      row, column = strip_order(inside, unit_rows, columns, tile.strip)
      return launch.of_pair(row), column, expert, group_g[expert, 0], group_g[expert, 1]

    def compute(group):
      launch.set_registers(multiplies=True)

      def store(sums, expert, row, column):
        steps = itertools.product(itertools.chain(*sums), range(0, _CHUNK, stored))
        for i, (total, c) in enumerate(steps):
          send = functools.partial(
            _send,
            total[:, c : c + stored],
            to=dw_g.at[expert, pl.ds(row, SLAB), pl.ds(column + i * stored, stored)],
            buffer=dw_s.at[group, i % 2],
            adds=into_EDF is not None,
          )
          # past column F TMA drops what it is given, but nothing may be read
          exists = column + i * stored < f
          pl.when(exists)(send) if into_EDF is not None and f % tile.n else send()

      def multiply(i, carry):
        done, (row, column, expert, _, blocks) = carry
        # before the products, which hide the latency of these loads and divisions
        upcoming = where(i + 1)
        sums = _contract(pipe, group, done, blocks, parts=tile.n // BLOCK)
        first = row * tile.m + group * SLAB
        # the last tile of a pair may not exist
        pl.when(first < d)(lambda: store(sums, expert, first, column * tile.n))
        return done.after(blocks), upcoming

      lax.fori_loop(0, my_tiles, multiply, (mosaic_fp8.start(), where(jnp.int32(0))))
      plgpu.wait_smem_to_gmem(0)

    for one in range(2):
      pl.when(group == one)(functools.partial(compute, one))

    @pl.when(group == 2)
    def _():
      launch.set_registers(multiplies=False)

      def load(i, done):
        row, column, _, base, blocks = where(i)
        at_d, at_f = pl.ds(row * tile.m, tile.m), pl.ds(column * tile.n, tile.n)
        multicast = launch.multicast

        # past row D, column F or block B, TMA writes zeros
        def operands(block):
          at_r = pl.ds(pl.multiple_of((base + block) * BLOCK, BLOCK), BLOCK)
          return x_g.at[at_d, at_r], dy_g.at[at_f, at_r]

        def copy_scales(block, slot, ready):
          at = pl.ds(base + block, ROUND)
          x_s, y_s = (pipe.scales_s[name].at[slot] for name in 'xy')
          plgpu.copy_gmem_to_smem(sx_g.at[at, at_d], x_s, ready)
          plgpu.copy_gmem_to_smem(sy_g.at[at, at_f], y_s, ready, collective_axes=multicast)

        mosaic_fp8.load(pipe, done, blocks, operands, copy_scales, multicast=multicast)
        return done.after(blocks)

      mosaic_fp8.drain(pipe, lax.fori_loop(0, my_tiles, load, mosaic_fp8.start()))

  scales = {n: plgpu.SMEM((2, ROUND, m), jnp.float32) for n, m in (('x', tile.m), ('y', tile.n))}
  staging = plgpu.SMEM((2, 2, SLAB, stored), dtype, transforms=smem_layout(stored, dtype.itemsize))
  return launch.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((num_experts, d, f), dtype),
    scratch_types=(mosaic_fp8.scratch(launch, x_DR.dtype, tile.n, scales, turns=True), staging),
    name='grouped_matmul_wgrad_fp8',
    into=into_EDF,
  )(x_DR, x_scale_BD, dy_FR, dy_scale_BF, group_E2)


def _send(sums: Any, *, to: Any, buffer: Any, adds: bool) -> None:
  if adds:
    before = plgpu.load(to, layout=plgpu.Layout.WGMMA, optimized=False)
    sums = sums + before.astype(jnp.float32)
  # of two buffers, this one's last copy
  plgpu.wait_smem_to_gmem(1, wait_read_only=True)
  buffer[...] = sums.astype(to.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(buffer, to)


def _contract(
  pipe: mosaic_fp8.Pipe,
  group: int,
  done: mosaic_fp8.Progress,
  num_blocks: jax.Array,
  *,
  parts: int,
) -> Any:
  """This warpgroup's sums over all blocks of a tile: of each 128 columns, by chunks of 32.

  The group is a Python number: with addresses that depend on it, ptxas clears accumulators by hand.
  """
  layout = plgpu.Layout.WGMMA
  rows, chunks = pl.ds(group * SLAB, SLAB), range(0, BLOCK, _CHUNK)

  def block(slot, sums, scale_slot):
    plgpu.barrier_wait(pipe.full.at[group * ROUND + slot])
    new, x_scale = [], None
    for part, before in enumerate(sums):
      start = part * BLOCK

      def multiply(acc, start=start, x_scale=x_scale):
        plgpu.wgmma(acc, pipe.a_s.at[slot, rows], pipe.b_s.at[slot, pl.ds(start, BLOCK)].T)
        if x_scale is None:
          source = pipe.scales_s['x'].at[scale_slot, slot, rows]
          x_scale = plgpu.load(source, layout=layout.reduce(1))
        return plgpu.wgmma_accumulator_load(acc, wait_n=0), x_scale

      acc = plgpu.WGMMAAccumulatorRef((SLAB, BLOCK), jnp.float32)
      product, x_scale = pl.run_scoped(multiply, acc)
      if part == parts - 1:
        plgpu.barrier_arrive(pipe.empty.at[slot])
        if group == 0:
          plgpu.barrier_arrive(pipe.full.at[ROUND + slot])
      after = []
      for c, total in zip(chunks, before, strict=True):
        source = pipe.scales_s['y'].at[scale_slot, slot, pl.ds(start + c, _CHUNK)]
        y_scale = plgpu.load(source, layout=layout.reduce(0))
        chunk = product[:, c : c + _CHUNK]
        chunk = chunk * lax.broadcast_in_dim(x_scale, chunk.shape, [0])
        after.append(total + chunk * lax.broadcast_in_dim(y_scale, chunk.shape, [1]))
      # or they are put off until the next product is under way, for which registers are short
      new.append(lax.optimization_barrier(after))
    return new

  def one_round(r, sums):
    scale_slot = lax.rem(done.rounds + r, jnp.int32(2))
    plgpu.barrier_wait(pipe.scales_full.at[scale_slot])
    slots = lax.min(num_blocks - r * ROUND, ROUND)
    sums = lax.fori_loop(0, slots, lambda slot, sums: block(slot, sums, scale_slot), sums)
    plgpu.commit_smem()
    plgpu.barrier_arrive(pipe.scales_empty.at[scale_slot])
    return sums

  zeros = plgpu.layout_cast(jnp.zeros((SLAB, _CHUNK), jnp.float32), layout)
  sums = [[zeros for _ in chunks] for _ in range(parts)]
  return lax.fori_loop(0, mosaic_fp8.num_rounds(num_blocks), one_round, sums)
