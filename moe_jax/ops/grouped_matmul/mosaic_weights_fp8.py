"""Hopper kernel in FP8: the gradient in the weights, dw[e] = x[rows of e].T @ dy[rows of e].

  dw[e, d, f] = sum over blocks b of 128 rows of e:
                (x[d, b] . dy[f, b]) * x_scale[b, d] * dy_scale[b, f]

Operands are transposed copies, x [D, R] and dy [F, R], scaled 128 rows at a time, because FP8 wgmma
contracts along what is contiguous. The pipeline is that of mosaic_fp8.py, the order of tiles that
of mosaic_weights.py; a promotion multiplies with the scales of rows and of columns, twice the work
of the other kernel. Groups start on multiples of 128 rows and rows of no expert hold zeros, so
whole blocks are multiplied and nothing is masked.

A pair of blocks has tiles one above the other and multicasts their part of dy.
"""

# R rows  D rows of dw  F columns of dw  E experts  B blocks of 128 rows

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
  unit_rows, columns = pl.cdiv(d, tile.m * tile.pair), f // BLOCK
  launch = Launch(tile.pair)
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

    @pl.when(group < 2)
    def _():
      launch.set_registers(multiplies=True)
      chunks = range(0, BLOCK, _CHUNK)

      def promote(sums, product, slot, block):
        layout = plgpu.Layout.WGMMA
        x_scale = plgpu.load(
          pipe.scales_s['x'].at[slot, block, pl.ds(group * SLAB, SLAB)], layout=layout.reduce(1)
        )
        new = []
        for c, total in zip(chunks, sums, strict=True):
          y_scale = plgpu.load(
            pipe.scales_s['y'].at[slot, block, pl.ds(c, _CHUNK)], layout=layout.reduce(0)
          )
          part = product[:, c : c + _CHUNK]
          part = part * lax.broadcast_in_dim(x_scale, part.shape, [0])
          new.append(total + part * lax.broadcast_in_dim(y_scale, part.shape, [1]))
        return new

      def store(sums, expert, row, column):
        for i, (c, total) in enumerate(zip(chunks, sums, strict=True)):
          to = dw_g.at[expert, pl.ds(row, SLAB), pl.ds(column + c, _CHUNK)]
          if into_EDF is not None:
            before = plgpu.load(to, layout=plgpu.Layout.WGMMA, optimized=False)
            total = total + before.astype(jnp.float32)
          buffer = dw_s.at[group, i]
          if i == 0:
            # all of the last tile
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          buffer[...] = total.astype(dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(buffer, to)

      def multiply(i, carry):
        done, (row, column, expert, _, blocks) = carry
        # before the products, which hide the latency of these loads and divisions
        upcoming = where(i + 1)
        zeros = plgpu.layout_cast(jnp.zeros((SLAB, _CHUNK), jnp.float32), plgpu.Layout.WGMMA)
        sums = mosaic_fp8.contract(
          pipe, done, blocks, [zeros for _ in chunks], promote, overlap=False, unroll=True
        )
        first = row * tile.m + group * SLAB
        # the last tile of a pair may not exist
        pl.when(first < d)(lambda: store(sums, expert, first, column * BLOCK))
        return done.after(blocks), upcoming

      lax.fori_loop(0, my_tiles, multiply, (mosaic_fp8.start(), where(jnp.int32(0))))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      launch.set_registers(multiplies=False)

      def load(i, done):
        row, column, _, base, blocks = where(i)
        at_d, at_f = pl.ds(row * tile.m, tile.m), pl.ds(column * BLOCK, BLOCK)
        shared: Any = {'collective_axes': launch.multicast}

        # past row D or block B, TMA writes zeros
        def copy_block(block, slot, ready):
          at_r = pl.ds(pl.multiple_of((base + block) * BLOCK, BLOCK), BLOCK)
          plgpu.copy_gmem_to_smem(x_g.at[at_d, at_r], pipe.a_s.at[slot], ready)
          plgpu.copy_gmem_to_smem(dy_g.at[at_f, at_r], pipe.b_s.at[slot], ready, **shared)

        def copy_scales(block, slot, ready):
          at = pl.ds(base + block, ROUND)
          plgpu.copy_gmem_to_smem(sx_g.at[at, at_d], pipe.scales_s['x'].at[slot], ready)
          plgpu.copy_gmem_to_smem(sy_g.at[at, at_f], pipe.scales_s['y'].at[slot], ready, **shared)

        mosaic_fp8.load(pipe, done, blocks, copy_block, copy_scales)
        return done.after(blocks)

      mosaic_fp8.drain(pipe, lax.fori_loop(0, my_tiles, load, mosaic_fp8.start()))

  scales = {n: plgpu.SMEM((2, ROUND, m), jnp.float32) for n, m in (('x', tile.m), ('y', BLOCK))}
  return launch.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((num_experts, d, f), dtype),
    scratch_types=(
      mosaic_fp8.scratch(launch, x_DR.dtype, scales),
      plgpu.SMEM(
        (2, BLOCK // _CHUNK, SLAB, _CHUNK),
        dtype,
        transforms=smem_layout(_CHUNK, dtype.itemsize),
      ),
    ),
    name='grouped_matmul_wgrad_fp8',
    into=into_EDF,
  )(x_DR, x_scale_BD, dy_FR, dy_scale_BF, group_E2)
