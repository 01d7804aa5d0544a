"""Hopper kernel for SwiGLU's gradient that ends in FP8: all that the products read, in one pass.

tile     128 rows x 128 columns of da, gate and up, halved between two warpgroups as in
         quantize/mosaic_tiles.py. The three results are rounded to da's dtype, as where they are
         stored between kernels, and quantised: the gradients of gate and up by rows and by
         columns, weight * a by columns
sums     each warpgroup's share of the gradient in the weight is a row of its own, added up by XLA
traffic  4 bytes for each of R x F in (6 where h is bfloat16), 5 out
bound    memory, nearly: about 70 instructions for each of R x F, with all registers taken
"""

# R rows  F width of gate and of up

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops import mosaic_inline as inline
from moe_jax.ops.quantize import mosaic_tiles as tiles
from moe_jax.ops.quantize.format import TILE, Format, Quantized, magnitude, scale_and_inverse
from moe_jax.ops.quantize.mosaic_tiles import COLUMNS, HALF, LAYOUT, aligned, settle
from moe_jax.ops.swiglu import reference
from moe_jax.ops.varying import match_vma


def unsupported(da_RF: jax.Array, h_R2F: jax.Array | Quantized) -> str | None:
  """Why the kernel cannot run here, in one line, or None if it can."""
  hidden = h_R2F.values if isinstance(h_R2F, Quantized) else h_R2F
  return tiles.unsupported(da_RF.dtype) or tiles.unsupported(hidden.dtype, jnp.float8_e4m3fn)


def _reciprocal(x: jax.Array, *, native: bool) -> jax.Array:
  """Of half a tile, in one instruction; a reciprocal root comes with three for tiny values."""
  if not native:
    return 1 / x

  @inline.inlined(LAYOUT, returns=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=LAYOUT))
  def reciprocal(_, x):
    return x._pointwise(x._lift_fast_instr('rcp.approx.ftz.f32'))

  return reciprocal(x)


@functools.partial(jax.jit, static_argnames=('fmts', 'limit', 'native'))
def backward_quantized(
  da_RF: jax.Array,
  h_R2F: jax.Array | Quantized,
  weight_R: jax.Array,
  fmts: tuple[Format, Format, Format],
  *,
  limit: float,
  native: bool = True,
) -> tuple[Quantized, Quantized, Quantized, jax.Array]:
  """`native` is False in the interpreter."""
  h, scale = (h_R2F.values, (h_R2F.scale,)) if isinstance(h_R2F, Quantized) else (h_R2F, ())
  da_RF, h, weight_R, *scale = match_vma(da_RF, h, weight_R, *scale)
  num_rows, f = da_RF.shape
  stages, wide = 2 if scale else 1, f // TILE
  row_fmt, col_fmt, a_fmt = fmts
  row_dtype, col_dtype, a_dtype = (jnp.dtype(fmt.dtype) for fmt in fmts)

  def kernel(da_g, h_g, weight_g, *refs):
    scale_g, refs = refs[: len(scale)], refs[len(scale) :]
    (row_g, row_scale_g, col_g, col_scale_g, a_g, a_scale_g, dw_g), refs = refs[:7], refs[7:]
    da_s, h_s, weight_s, h_scale_s, col_s, a_s, *small, full, met = refs
    most_row_s, most_col_s, scale_s, inverse_s, dw_s = small

    def place(tile):
      """Row and column among tiles of da, and the columns of gate and of up among those of h."""
      column = lax.rem(tile, jnp.int32(wide))
      return lax.div(tile, jnp.int32(wide)), column, (column, wide + column)

    def bring(tile, pair, slot):
      del pair
      row, column, both = place(tile)
      copy = lambda a, b: plgpu.copy_gmem_to_smem(a, b, full.at[slot])
      copy(da_g.at[aligned(row), aligned(column)], da_s.at[slot])
      copy(weight_g.at[aligned(row)], weight_s.at[slot])
      for n, at in enumerate(both):
        copy(h_g.at[aligned(row), aligned(at)], h_s.at[slot, n])
        if scale:
          copy(scale_g[0].at[at, aligned(row)], h_scale_s.at[slot, n])

    sigmoid_of = lambda x: _reciprocal(1 + jnp.exp(-x), native=native)
    by_row = lambda ref: plgpu.load(ref, layout=LAYOUT.reduce(1))
    across = lambda a_R: lax.broadcast_in_dim(a_R, (TILE, HALF), [0])

    def gradients(slot, half):
      def hidden(n):
        x = plgpu.load(h_s.at[slot, n, :, half], layout=LAYOUT).astype(jnp.float32)
        return x * across(by_row(h_scale_s.at[slot, n])) if scale else x

      da = plgpu.load(da_s.at[slot, :, half], layout=LAYOUT)
      weight = across(by_row(weight_s.at[slot]))
      return reference.gradients(da, hidden(0), hidden(1), weight, limit=limit, sigmoid=sigmoid_of)

    def work(tile, pair, side, slot, odd, meet):
      del pair
      half = aligned(side, HALF)
      plgpu.barrier_wait(full.at[slot])
      *results, dweight = gradients(slot, half)
      results = [x.astype(da_RF.dtype) for x in results]
      # the last tile's results have left
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      dw_s[side] = dweight.sum(1)
      for n, x in enumerate(results):
        bits = magnitude(x)
        tiles.store_largest(most_col_s, bits, odd * 3 + n, side, native=native)
        if n < 2:
          most_row_s[odd, n, side] = bits.max(1)
      meet()

      largest = [tiles.largest_of(most_row_s.at[odd, n]) for n in range(2)]
      largest += [tiles.largest_of(most_col_s.at[odd * 3 + n]) for n in range(3)]
      kinds = (row_fmt, row_fmt, col_fmt, col_fmt, a_fmt)
      for n, (bits, fmt) in enumerate(zip(largest, kinds, strict=True)):
        found, inverse_s[side, n] = scale_and_inverse(bits, fmt)

        @pl.when(side == 0)
        def _(n=n, found=found):
          scale_s[n] = found

      settle()
      row, column, both = place(tile)
      for n, x in enumerate(results):
        x = x.astype(jnp.float32)
        if n < 2:
          # 64 bytes a row, from registers: there is no room to stage them
          at = aligned(row), aligned(both[n] * 2 + side, HALF)
          row_g[at] = (x * across(by_row(inverse_s.at[side, n]))).astype(row_dtype)
        inverse = plgpu.load(inverse_s.at[side, 2 + n, half], layout=LAYOUT.reduce(0))
        x = x * lax.broadcast_in_dim(inverse, x.shape, [1])
        if n < 2:
          tiles.store_transposed(col_s, x.astype(col_dtype), n * 2 + side, native=native)
        else:
          tiles.store_transposed(a_s, x.astype(a_dtype), side, native=native)
      settle()

      for n, at in enumerate(both):
        own = aligned(at * 2 + side, HALF)
        plgpu.copy_smem_to_gmem(col_s.at[n * 2 + side], col_g.at[own, aligned(row)])
      own = aligned(column * 2 + side, HALF)
      plgpu.copy_smem_to_gmem(a_s.at[side], a_g.at[own, aligned(row)])
      plgpu.copy_smem_to_gmem(dw_s.at[side], dw_g.at[column * 2 + side, aligned(row)])

      @pl.when(side == 0)
      def _():
        for n, at in enumerate(both):
          plgpu.copy_smem_to_gmem(scale_s.at[n], row_scale_g.at[at, aligned(row)])
          plgpu.copy_smem_to_gmem(scale_s.at[2 + n], col_scale_g.at[row, aligned(at)])
        plgpu.copy_smem_to_gmem(scale_s.at[4], a_scale_g.at[row, aligned(column)])

    tiles.each_tile(
      num_rows // TILE * wide, pairs=1, stages=stages, met=met, bring=bring, work=work
    )

  array = jax.ShapeDtypeStruct
  found = tiles.launch(
    kernel,
    'swiglu_backward_quantized',
    pairs=1,
    out=(
      array((num_rows, 2 * f), row_dtype),
      array((2 * wide, num_rows), jnp.float32),
      array((2 * f, num_rows), col_dtype),
      array((num_rows // TILE, 2 * f), jnp.float32),
      array((f, num_rows), a_dtype),
      array((num_rows // TILE, f), jnp.float32),
      array((2 * wide, num_rows), jnp.float32),
    ),
    scratch=(
      plgpu.SMEM((stages, TILE, TILE), da_RF.dtype),
      plgpu.SMEM((stages, 2, TILE, TILE), h.dtype),
      plgpu.SMEM((stages, TILE), jnp.float32),
      plgpu.SMEM((stages, 2, TILE), jnp.float32),
      plgpu.SMEM((4, HALF, TILE), col_dtype, transforms=COLUMNS),
      plgpu.SMEM((2, HALF, TILE), a_dtype, transforms=COLUMNS),
      plgpu.SMEM((2, 2, 2, TILE), jnp.int32),
      plgpu.SMEM((2 * 3, 4, TILE), jnp.int32),
      plgpu.SMEM((5, TILE), jnp.float32),
      plgpu.SMEM((2, 5, TILE), jnp.float32),
      plgpu.SMEM((2, TILE), jnp.float32),
      plgpu.Barrier(num_arrivals=4 + 2 * len(scale), num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=1),
    ),
  )(da_RF, h, weight_R, *scale)
  _, *found = match_vma(da_RF, *found)
  row, col, a = (Quantized(*found[i : i + 2]) for i in (0, 2, 4))
  return row, col, a, found[6].sum(0)
