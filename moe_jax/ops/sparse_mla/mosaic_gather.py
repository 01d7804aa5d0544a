"""How scattered rows reach the tensor cores: cp.async by one warpgroup, in TMA's swizzled layout.

Hopper's TMA cannot gather single rows, and Mosaic has no vector-indexed loads. So the gathering
warpgroup is a few inlined instructions: each thread copies 16 bytes at a time from the rows whose
numbers it holds to where the 128-byte swizzle puts them, and the copies of one tile, 64 rows x 64
columns, arrive on a barrier of its own when they land.

Inlined code has no interpreter. `native=False` does the same with loops over rows and ordinary
barriers, for tests without a GPU.
"""

# S keys  X width  T queries  K slots of a query

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
from jaxlib.mlir.dialects import arith, llvm, vector

from moe_jax.ops.mosaic_inline import (
  SCALAR,
  THREADS,
  TILE,
  TRANSFORMS,
  Arrivals,
  byte_at,
  drain,
  i32,
  inlined,
  thread,
)

__all__ = ['BLOCK', 'TILE', 'Arrivals', 'drain', 'gather_tile', 'hold_rows']

# rows gathered at a time, and the columns of one tile: one row of the 128-byte swizzle
BLOCK = 64
_CHUNK_BYTES = 16
_ROWS_A_PASS = THREADS * _CHUNK_BYTES // (TILE * 2)
_PASSES = BLOCK // _ROWS_A_PASS

# the row numbers a thread of the gathering warpgroup holds; opaque to everything else
_HELD = (THREADS * _PASSES,)
_HELD_LAYOUT = plgpu.Layout.WG_STRIDED(_HELD, _PASSES)


def hold_rows(index_g: Any, query: jax.Array, block: jax.Array, *, native: bool) -> Any:
  """The row numbers of a block of a query's slots, each where the thread that needs it has it."""
  if not native:
    return query, block
  num_slots = index_g.shape[1]

  @inlined(
    plgpu.RefType(),
    SCALAR,
    SCALAR,
    returns=plgpu.ShapeDtypeStruct(_HELD, jnp.int32, layout=_HELD_LAYOUT),
  )
  def hold(_, ref, query, block):
    int32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
    query, block = query.registers.item(), block.registers.item()
    base = mgpu_utils.memref_ptr(ref)
    first = arith.addi(
      arith.muli(block, i32(BLOCK)), arith.divui(thread(), i32(THREADS // _ROWS_A_PASS))
    )
    start = arith.muli(arith.extui(i64, query), mgpu_utils.c(num_slots, i64))
    at = arith.addi(start, arith.extui(i64, first))
    held = llvm.mlir_undef(ir.VectorType.get((_PASSES,), int32))
    for n in range(_PASSES):
      here = arith.addi(at, mgpu_utils.c(n * _ROWS_A_PASS, i64))
      pointer = byte_at(base, arith.muli(here, mgpu_utils.c(4, i64)))
      row = mgpu_utils.inline_ptx(
        'ld.global.nc.b32 $0, [$1];', pointer, result_types=int32, has_side_effects=True
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

  @inlined(plgpu.RefType(), _HELD_LAYOUT, plgpu.RefType(TRANSFORMS), plgpu.RefType(), SCALAR)
  def start(_, rows, held, block, barriers, barrier):
    i64 = ir.IntegerType.get_signless(64)
    (registers,) = held.registers.flat
    chunks = TILE * 2 // _CHUNK_BYTES
    own = thread()
    chunk, inside = arith.remui(own, i32(chunks)), arith.divui(own, i32(chunks))
    swizzled = arith.xori(chunk, arith.remui(inside, i32(8)))
    source = mgpu_utils.memref_ptr(rows)
    source = byte_at(source, arith.muli(chunk, i32(_CHUNK_BYTES)))
    # [8 groups of 8 rows, tiles, 8, 64] as the tiling has it
    tiles = ir.MemRefType(block.type).shape[1]
    group, lane = arith.divui(inside, i32(8)), arith.remui(inside, i32(8))
    target = arith.addi(
      arith.muli(group, i32(tiles * 1024)),
      arith.addi(arith.muli(lane, i32(128)), arith.muli(swizzled, i32(_CHUNK_BYTES))),
    )
    target = byte_at(mgpu_utils.memref_ptr(block), target)
    for n in range(_PASSES):
      row = vector.extract(registers, dynamic_position=[], static_position=[n])
      offset = arith.muli(arith.extui(i64, row), mgpu_utils.c(2 * width, i64))
      mgpu_utils.inline_ptx(
        'cp.async.cg.shared.global.L2::128B [$0], [$1], 16;',
        byte_at(target, i32((n * _ROWS_A_PASS // 8 * tiles + into) * 1024)),
        byte_at(byte_at(source, offset), i32(tile * TILE * 2)),
        has_side_effects=True,
      )
    at = byte_at(mgpu_utils.memref_ptr(barriers), arith.muli(barrier.registers.item(), i32(8)))
    mgpu_utils.inline_ptx(
      'cp.async.mbarrier.arrive.noinc.shared.b64 [$0];', at, has_side_effects=True
    )

  start(rows_g, held, block_s, barriers, jnp.int32(barrier))
