"""How scattered rows reach the tensor cores: cp.async by one warpgroup, in TMA's swizzled layout.

Hopper's TMA cannot gather single rows, and Mosaic has no vector-indexed loads. So the gathering
warpgroup is a few inlined instructions: each thread copies 16 bytes at a time from the rows whose
numbers it holds to where the 128-byte swizzle puts them, and the copies of one tile, 64 rows x 64
columns, arrive on a barrier of its own when they land.

Inlined code has no interpreter. `native=False` does the same with loops over rows and ordinary
barriers, for tests without a GPU.
"""

# S keys  X width  T queries  K slots of a query

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

# rows gathered at a time, and the columns of one tile: one row of the 128-byte swizzle
BLOCK = 64
TILE = 64
_THREADS = 128
_CHUNK_BYTES = 16
_ROWS_A_PASS = _THREADS * _CHUNK_BYTES // (TILE * 2)
_PASSES = BLOCK // _ROWS_A_PASS

TRANSFORMS = (
  plgpu.TilingTransform((8, TILE)),  # pyright: ignore[reportAbstractUsage]
  plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)
# the row numbers a thread of the gathering warpgroup holds; opaque to everything else
_HELD = (_THREADS * _PASSES,)
_HELD_LAYOUT = plgpu.Layout.WG_STRIDED(_HELD, _PASSES)
_SCALAR = plgpu.Layout.WG_SPLAT


def _inlined(*arg_types: Any, returns: Any = None) -> Callable[[Callable], Callable]:
  """Makes a function of Mosaic's values, its context first, one of Pallas' values."""
  return plgpu.inline_mgpu(arg_types=arg_types, return_type=returns)


def _i32(value: int) -> Any:
  return mgpu_utils.c(value, ir.IntegerType.get_signless(32))


def _byte_at(pointer: Any, offset: Any) -> Any:
  return mgpu_utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _thread() -> Any:
  return arith.andi(mgpu_utils.thread_idx(), _i32(_THREADS - 1))


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

    @_inlined(plgpu.RefType())
    def init(_, ref):
      base = mgpu_utils.memref_ptr(ref)
      first = arith.cmpi(arith.CmpIPredicate.eq, _thread(), _i32(0))
      for i in range(self.count):
        at = _byte_at(base, _i32(8 * i))
        nvvm.mbarrier_init(at, _i32(_THREADS), predicate=first)
      mgpu_utils.inline_ptx('fence.mbarrier_init.release.cluster;', has_side_effects=True)
      mgpu_utils.warpgroup_barrier()

    init(barriers)

  def wait(self, barriers: Any, index: jax.Array | int, round_: jax.Array) -> None:
    """Until the tile's copies of the given round have landed and wgmma may read them."""
    if not self.native:
      plgpu.barrier_wait(barriers.at[index])
      return

    @_inlined(plgpu.RefType(), _SCALAR, _SCALAR)
    def wait(_, ref, index, round_):
      index, round_ = index.registers.item(), round_.registers.item()
      at = _byte_at(mgpu_utils.memref_ptr(ref), arith.muli(index, _i32(8)))
      parity = arith.andi(round_, _i32(1))
      ticks = _i32(10_000_000)
      nvvm.mbarrier_try_wait_parity(at, parity, ticks)
      # cp.async writes by the generic proxy, wgmma reads by the async one
      mgpu_utils.inline_ptx('fence.proxy.async.shared::cta;', has_side_effects=True)

    wait(barriers, jnp.int32(index), jnp.int32(round_))


def hold_rows(index_g: Any, query: jax.Array, block: jax.Array, *, native: bool) -> Any:
  """The row numbers of a block of a query's slots, each where the thread that needs it has it."""
  if not native:
    return query, block
  num_slots = index_g.shape[1]

  @_inlined(
    plgpu.RefType(),
    _SCALAR,
    _SCALAR,
    returns=plgpu.ShapeDtypeStruct(_HELD, jnp.int32, layout=_HELD_LAYOUT),
  )
  def hold(_, ref, query, block):
    i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
    query, block = query.registers.item(), block.registers.item()
    base = mgpu_utils.memref_ptr(ref)
    first = arith.addi(
      arith.muli(block, _i32(BLOCK)), arith.divui(_thread(), _i32(_THREADS // _ROWS_A_PASS))
    )
    start = arith.muli(arith.extui(i64, query), mgpu_utils.c(num_slots, i64))
    at = arith.addi(start, arith.extui(i64, first))
    held = llvm.mlir_undef(ir.VectorType.get((_PASSES,), i32))
    for n in range(_PASSES):
      here = arith.addi(at, mgpu_utils.c(n * _ROWS_A_PASS, i64))
      pointer = _byte_at(base, arith.muli(here, mgpu_utils.c(4, i64)))
      row = mgpu_utils.inline_ptx(
        'ld.global.nc.b32 $0, [$1];', pointer, result_types=i32, has_side_effects=True
      )
      held = vector.insert(row, held, dynamic_position=[], static_position=[n])
    layout = mgpu.WGStridedFragLayout(_HELD, _PASSES)
    return mgpu.FragmentedArray(
      _registers=np.array([held], dtype=object), _layout=layout, _is_signed=True
    )

  return hold(index_g, query, block)


def gather_tile(
  rows_g: Any,
  held: Any,
  index_g: Any,
  block_s: Any,
  barriers: Any,
  *,
  tile: int,
  into: int,
  barrier: jax.Array | int,
  native: bool,
) -> None:
  """Starts copying 64 columns of the held rows; does not wait.

  Args:
    rows_g: [S, X] in device memory, X a multiple of 64.
    block_s: [64, tiles * 64] in shared memory, tiled and swizzled.
    tile: which 64 columns of the rows; `into` says which of the block.
    barrier: which barrier the copies arrive on.
  """
  if not native:
    query, block = held

    def copy(i, _):
      row = index_g[query, block * BLOCK + i]
      block_s[i, pl.ds(into * TILE, TILE)] = rows_g[row, pl.ds(tile * TILE, TILE)]

    lax.fori_loop(0, BLOCK, copy, None)
    plgpu.commit_smem()
    plgpu.barrier_arrive(barriers.at[barrier])
    return
  width = rows_g.shape[1]

  @_inlined(plgpu.RefType(), _HELD_LAYOUT, plgpu.RefType(TRANSFORMS), plgpu.RefType(), _SCALAR)
  def start(_, rows, held, block, barriers, barrier):
    i64 = ir.IntegerType.get_signless(64)
    (registers,) = held.registers.flat
    chunks = TILE * 2 // _CHUNK_BYTES
    thread = _thread()
    chunk, inside = arith.remui(thread, _i32(chunks)), arith.divui(thread, _i32(chunks))
    swizzled = arith.xori(chunk, arith.remui(inside, _i32(8)))
    source = mgpu_utils.memref_ptr(rows)
    source = _byte_at(source, arith.muli(chunk, _i32(_CHUNK_BYTES)))
    # [8 groups of 8 rows, tiles, 8, 64] as the tiling has it
    tiles = ir.MemRefType(block.type).shape[1]
    group, lane = arith.divui(inside, _i32(8)), arith.remui(inside, _i32(8))
    target = arith.addi(
      arith.muli(group, _i32(tiles * 1024)),
      arith.addi(arith.muli(lane, _i32(128)), arith.muli(swizzled, _i32(_CHUNK_BYTES))),
    )
    target = _byte_at(mgpu_utils.memref_ptr(block), target)
    for n in range(_PASSES):
      row = vector.extract(registers, dynamic_position=[], static_position=[n])
      offset = arith.muli(arith.extui(i64, row), mgpu_utils.c(2 * width, i64))
      mgpu_utils.inline_ptx(
        'cp.async.cg.shared.global.L2::128B [$0], [$1], 16;',
        _byte_at(target, _i32((n * _ROWS_A_PASS // 8 * tiles + into) * 1024)),
        _byte_at(_byte_at(source, offset), _i32(tile * TILE * 2)),
        has_side_effects=True,
      )
    at = _byte_at(mgpu_utils.memref_ptr(barriers), arith.muli(barrier.registers.item(), _i32(8)))
    mgpu_utils.inline_ptx(
      'cp.async.mbarrier.arrive.noinc.shared.b64 [$0];', at, has_side_effects=True
    )

  start(rows_g, held, block_s, barriers, jnp.int32(barrier))


def drain(*, native: bool) -> None:
  """Waits for the thread's own copies: a block must not end before them."""
  if native:

    @_inlined()
    def wait(_):
      mgpu_utils.inline_ptx('cp.async.wait_all;', has_side_effects=True)

    wait()
