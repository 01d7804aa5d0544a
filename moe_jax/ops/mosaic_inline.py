"""Inlined instructions in Mosaic kernels: what lets a warpgroup copy rows that TMA cannot gather.

Each thread copies 16 bytes at a time with cp.async to where the 128-byte swizzle puts them; the
copies arrive on barriers of their own when they land. Inlined code has no interpreter: with
`native=False` ordinary barriers take their place, for tests without a GPU.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf, vector

# of a warpgroup
THREADS = 128
# columns of 16 bits in one row of the 128-byte swizzle
TILE = 64
SCALAR = plgpu.Layout.WG_SPLAT
TRANSFORMS = (
  plgpu.TilingTransform((8, TILE)),  # pyright: ignore[reportAbstractUsage]
  plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)


def inlined(*arg_types: Any, returns: Any = None) -> Callable[[Callable], Callable]:
  """Makes a function of Mosaic's values, its context first, one of Pallas' values."""
  return plgpu.inline_mgpu(arg_types=arg_types, return_type=returns)


def i32(value: int) -> Any:
  return mgpu_utils.c(value, ir.IntegerType.get_signless(32))


def byte_at(pointer: Any, offset: Any) -> Any:
  return mgpu_utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def thread() -> Any:
  return arith.andi(mgpu_utils.thread_idx(), i32(THREADS - 1))


@dataclasses.dataclass(frozen=True)
class Arrivals:
  """One barrier a tile that gathered copies arrive on. `count` in all.

  Native ones are made of plain shared memory, as Pallas' barriers cannot be handed to inlined code;
  who waits names the parity himself: that of how often the barrier was waited for before.
  """

  count: int
  native: bool

  def scratch(self) -> Any:
    if self.native:
      return plgpu.SMEM((self.count,), jnp.int64)
    return plgpu.Barrier(num_arrivals=1, num_barriers=self.count)

  def init(self, barriers: Any) -> None:
    """By one warpgroup, before any other is told that it may go on."""
    if not self.native:
      return

    @inlined(plgpu.RefType())
    def init(_, ref):
      base = mgpu_utils.memref_ptr(ref)
      first = arith.cmpi(arith.CmpIPredicate.eq, thread(), i32(0))
      for i in range(self.count):
        at = byte_at(base, i32(8 * i))
        nvvm.mbarrier_init(at, i32(THREADS), predicate=first)
      mgpu_utils.inline_ptx('fence.mbarrier_init.release.cluster;', has_side_effects=True)
      mgpu_utils.warpgroup_barrier()

    init(barriers)

  def wait(self, barriers: Any, index: jax.Array | int, round_: jax.Array) -> None:
    """Until the tile's copies of the given round have landed and wgmma may read them."""
    if not self.native:
      plgpu.barrier_wait(barriers.at[index])
      return

    @inlined(plgpu.RefType(), SCALAR, SCALAR)
    def wait(_, ref, index, round_):
      index, round_ = index.registers.item(), round_.registers.item()
      at = byte_at(mgpu_utils.memref_ptr(ref), arith.muli(index, i32(8)))
      parity = arith.andi(round_, i32(1))
      ticks = i32(10_000_000)
      nvvm.mbarrier_try_wait_parity(at, parity, ticks)
      # cp.async writes by the generic proxy, wgmma reads by the async one
      mgpu_utils.inline_ptx('fence.proxy.async.shared::cta;', has_side_effects=True)

    wait(barriers, jnp.int32(index), jnp.int32(round_))


def drain(*, native: bool) -> None:
  """Waits for the thread's own copies: a block must not end before them."""
  if native:

    @inlined()
    def wait(_):
      mgpu_utils.inline_ptx('cp.async.wait_all;', has_side_effects=True)

    wait()


def scale_rows(matrix: jax.Array, factor: jax.Array, *, native: bool) -> jax.Array:
  """matrix * factor[:, None] in registers; a warp whose factors are all 1 multiplies nothing.

  Args:
    matrix: float32 in the layout of wgmma's sums, and `factor` in that of its rows.
  """
  layout = plgpu.Layout.WGMMA
  if not native:
    return matrix * jax.lax.broadcast_in_dim(factor, matrix.shape, [0])

  @inlined(
    layout,
    layout.reduce(1),
    returns=plgpu.ShapeDtypeStruct(matrix.shape, matrix.dtype, layout=layout),
  )
  def scale(_, matrix, factor):
    f32, i32_type = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    one = arith.constant(f32, 1.0)
    differs = None
    for register in factor.registers.flat:
      value = vector.extract(register, dynamic_position=[], static_position=[0])
      this = arith.cmpf(arith.CmpFPredicate.UNE, value, one)
      differs = this if differs is None else arith.ori(differs, this)
    vote = mgpu_utils.inline_ptx(
      '{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; '
      'selp.u32 $0, 1, 0, p; }',
      arith.extui(i32_type, differs),
      result_types=i32_type,
      has_side_effects=True,
    )
    some = arith.cmpi(arith.CmpIPredicate.ne, vote, i32(0))
    registers = list(matrix.registers.flat)
    branch = scf.IfOp(some, [r.type for r in registers], has_else=True)
    with ir.InsertionPoint(branch.then_block):
      wide = factor.broadcast_in_dim(matrix.shape, (0,), matrix.layout)
      scf.yield_(list((matrix * wide).registers.flat))
    otherwise: Any = branch.else_block
    with ir.InsertionPoint(otherwise):
      scf.yield_(registers)
    results = np.array(list(branch.results), dtype=object).reshape(matrix.registers.shape)
    return mgpu.FragmentedArray(_registers=results, _layout=matrix.layout, _is_signed=None)

  return scale(matrix, factor)
