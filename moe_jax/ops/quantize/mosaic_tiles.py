"""What the Hopper kernels that quantise share: a tile between two warpgroups, its way in and out.

tile   128 x 128 values, half of the columns in the registers of each of two warpgroups. A thread
       has 16 rows of 4 columns, so that it has a column's bytes together, four to a word, and
       nothing is exchanged but the largest values
block  persistent, of pairs of warpgroups; TMA fills each pair's ring, and takes results away
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from moe_jax.ops import mosaic_inline as inline
from moe_jax.ops.backends import num_sms, on_hopper
from moe_jax.ops.quantize.format import TILE

HALF = 64
# of half a tile: 16 rows of 4 columns a thread, 16 threads side by side
LAYOUT = plgpu.Layout.TILED(
  plgpu.Tiling(((TILE, HALF), (32, HALF), (16, HALF), (4,))),
  warp_dims=(-7,),
  lane_dims=(-5, -2),
  vector_dim=-1,
)
LINE = plgpu.Layout.WG_STRIDED((TILE,), 1)
# of half a tile transposed
COLUMNS = (
  plgpu.TilingTransform((8, TILE)),  # pyright: ignore[reportAbstractUsage]
  plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)
# what is written and read through shared memory is told apart by hand, see `settle`
PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


def unsupported(dtype: jax.typing.DTypeLike, *more: jax.typing.DTypeLike) -> str | None:
  """Why no kernel here takes values of this dtype, or of `more`, in one line, or None."""
  if not on_hopper():
    return f'needs a Hopper GPU (compute capability 9.0), this is {jax.devices()[0].device_kind}'
  if dtype not in (jnp.bfloat16, *more):
    return f'needs bfloat16, got {dtype}'
  return None


def aligned(index: Any, size: int = TILE) -> pl.Slice:
  """The index-th `size` of them."""
  return pl.ds(pl.multiple_of(index * size, size), size)


def settle() -> None:
  """What threads of a warpgroup wrote to shared memory is there for all of them, and for TMA."""
  plgpu.commit_smem()


def each_tile(
  total: int, *, pairs: int, stages: int, met: Any, bring: Callable, work: Callable
) -> None:
  """The body of a kernel: this pair's share of tiles, brought into a ring ahead of the work.

  Args:
    met: barriers of two arrivals, one a pair.
    bring: (tile, pair, slot) -> starts its copies.
    work: (tile, pair, side, slot, odd, meet); `slot` must have arrived, and may be filled again as
      soon as both sides have called `meet`. Each side then sees what the other wrote before; `odd`
      alternates, to tell what is written for a meeting from what is still read after the last.
  """
  group = lax.axis_index('warpgroup')
  pair, side = lax.div(group, jnp.int32(2)), lax.rem(group, jnp.int32(2))
  workers = num_sms() * pairs
  first = lax.axis_index('block') * pairs + pair
  mine = lax.max(pl.cdiv(total - first, workers), 0)

  def load(i):
    @pl.when((side == 0) & (i < mine))
    def _():
      bring(first + i * workers, pair, lax.rem(i, jnp.int32(stages)))

  for i in range(stages):
    load(jnp.int32(i))

  def step(i, _):
    def meet():
      plgpu.barrier_arrive(met.at[pair])
      plgpu.barrier_wait(met.at[pair])
      # TMA writes after what both have read
      settle()
      load(i + stages)

    slot, odd = lax.rem(i, jnp.int32(stages)), lax.rem(i, jnp.int32(2))
    work(first + i * workers, pair, side, slot, odd, meet)

  lax.fori_loop(0, mine, step, None)
  plgpu.wait_smem_to_gmem(0)


def launch(kernel: Callable, name: str, *, pairs: int, out: Any, scratch: Any) -> Callable:
  return plgpu.kernel(
    kernel,
    out_type=out,
    scratch_types=scratch,
    grid=(num_sms(),),
    grid_names=('block',),
    num_threads=2 * pairs,
    thread_name='warpgroup',
    kernel_name=name,
    compiler_params=PARAMS,
  )


def store_largest(
  largest_s: Any, bits: jax.Array, index: Any, side: jax.Array, *, native: bool
) -> None:
  """The largest of each column of half a tile, of each warp: in largest_s[index], [4, 128].

  Mosaic's own maximum across warps has one scratch for all warpgroups.
  """
  if not native:
    largest_s[index, :, aligned(side, HALF)] = bits.reshape(4, TILE // 4, HALF).max(1)
    return

  @inline.inlined(plgpu.RefType(), LAYOUT, inline.SCALAR, inline.SCALAR)
  def store(_, ref, bits, index, side):
    i32 = ir.IntegerType.get_signless(32)
    largest = functools.reduce(arith.maxsi, bits.registers.flat)
    packed = llvm.mlir_undef(ir.VectorType.get((4,), i32))
    for j in range(4):
      own = vector.extract(largest, dynamic_position=[], static_position=[j])
      own = arith.maxsi(own, mgpu_utils.shfl_bfly(own, 16))
      packed = vector.insert(own, packed, dynamic_position=[], static_position=[j])
    thread = inline.thread()
    warp, column = arith.divui(thread, inline.i32(32)), arith.remui(thread, inline.i32(16))
    line = arith.addi(arith.muli(index.registers.item(), inline.i32(4)), warp)
    at = arith.addi(
      arith.addi(arith.muli(line, inline.i32(TILE)), arith.muli(column, inline.i32(4))),
      arith.muli(side.registers.item(), inline.i32(HALF)),
    )
    base = mgpu_utils.memref_ptr(ref)
    llvm.store(packed, inline.byte_at(base, arith.muli(at, inline.i32(4))), alignment=16)

  store(largest_s, bits, jnp.int32(index), side)


def store_warps_largest(
  largest_s: Any, bits: jax.Array, index: Any, side: jax.Array, *, native: bool
) -> None:
  """The largest of half a tile, of each warp: largest_s[index, side * 4 + warp]."""
  if not native:
    largest_s[index, pl.ds(side * 4, 4)] = bits.reshape(4, -1).max(1)
    return

  @inline.inlined(plgpu.RefType(), LAYOUT, inline.SCALAR, inline.SCALAR)
  def store(_, ref, bits, index, side):
    largest = functools.reduce(arith.maxsi, bits.registers.flat)
    extract = lambda j: vector.extract(largest, dynamic_position=[], static_position=[j])
    own = functools.reduce(arith.maxsi, [extract(j) for j in range(4)])
    own = mgpu_utils.redux(own, inline.i32(-1), mgpu_utils.ReductionKind.MAX)
    warp = arith.divui(inline.thread(), inline.i32(32))
    at = arith.addi(
      arith.muli(index.registers.item(), inline.i32(8)),
      arith.addi(arith.muli(side.registers.item(), inline.i32(4)), warp),
    )
    base = mgpu_utils.memref_ptr(ref)
    llvm.store(own, inline.byte_at(base, arith.muli(at, inline.i32(4))), alignment=4)

  store(largest_s, bits, jnp.int32(index), side)


def largest_of(largest_s: Any) -> jax.Array:
  """Of [n, 128] numbers in shared memory, each column's, [128]: one a thread."""
  lines = [plgpu.load(largest_s.at[i], layout=LINE) for i in range(largest_s.shape[0])]
  return functools.reduce(jnp.maximum, lines)


def store_transposed(columns_s: Any, values: jax.Array, index: Any, *, native: bool) -> None:
  """Half a tile of 8-bit values as columns_s[index], [64, 128]."""
  if not native:
    columns_s[index] = values.T
    return

  @inline.inlined(plgpu.RefType(COLUMNS), LAYOUT, inline.SCALAR)
  def store(_, ref, values, index):
    i32 = ir.IntegerType.get_signless(32)
    words = [mgpu_utils.bitcast(r, i32) for r in values.registers.flat]
    thread = inline.thread()
    column, rows = arith.remui(thread, inline.i32(16)), arith.divui(thread, inline.i32(16))
    base = arith.muli(index.registers.item(), inline.i32(HALF * TILE))
    base = inline.byte_at(mgpu_utils.memref_ptr(ref), base)
    quads = [_transposed(words[i : i + 4]) for i in range(0, 16, 4)]
    for j in range(4):
      line = arith.addi(arith.muli(column, inline.i32(4)), inline.i32(j))
      swizzled = arith.xori(rows, arith.andi(line, inline.i32(7)))
      at = arith.addi(arith.muli(line, inline.i32(TILE)), arith.muli(swizzled, inline.i32(16)))
      packed = llvm.mlir_undef(ir.VectorType.get((4,), i32))
      for n, quad in enumerate(quads):
        packed = vector.insert(quad[j], packed, dynamic_position=[], static_position=[n])
      llvm.store(packed, inline.byte_at(base, at), alignment=16)

  store(columns_s, values, jnp.int32(index))


def _transposed(words: list[Any]) -> list[Any]:
  """Four words of four bytes: the transpose of the square."""
  pick = lambda a, b, selector: mgpu_utils.prmt(a, b, inline.i32(selector))
  a, b, c, d = words
  found = []
  for half in (0x5140, 0x7362):
    left, right = pick(a, b, half), pick(c, d, half)
    found += [pick(left, right, 0x5410), pick(left, right, 0x7632)]
  return found
