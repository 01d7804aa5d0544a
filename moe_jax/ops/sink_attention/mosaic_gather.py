"""How rows that a query names reach shared memory where wgmma reads them: cp.async by a warpgroup.

Hopper's TMA cannot gather single rows and Mosaic has no loads by an index vector, so this is a few
inlined instructions. A thread copies 16 bytes of every other row of a block of 64 rows, to where
the 64-byte swizzle puts them; the copies arrive on a barrier in plain shared memory, as Pallas' own
barriers cannot be handed to inlined code.

Inlined code has no interpreter: `native=False` does the same with array operations and an ordinary
barrier, for tests without a GPU.
"""

# R rows  C row width

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = 64  # rows gathered at a time
WIDTH = 512  # of a row; 1024 bytes, 8 for each thread of a warpgroup
TILING = (
  plgpu.TilingTransform((8, 32)),  # pyright: ignore[reportAbstractUsage]
  plgpu.SwizzleTransform(64),  # pyright: ignore[reportAbstractUsage]
)
_SCALAR = plgpu.Layout.WG_SPLAT
_THREADS = 128
_SLOT_BYTES = BLOCK * WIDTH * 2
_HALF_BYTES = _SLOT_BYTES // 2
_BAND_BYTES = 8 * WIDTH // 2 * 2  # 8 rows of half the columns, in tiles of 512 bytes


class Run(NamedTuple):
  """Rows of a block: row j is first + j, or first + index[at + j]; those from `live` on repeat."""

  first: jax.Array
  live: jax.Array
  at: jax.Array | None = None


def arrivals(slots: int, *, native: bool) -> Any:
  """Scratch for one barrier a slot."""
  if native:
    return plgpu.SMEM((2 * slots,), jnp.int32)
  return plgpu.Barrier(num_barriers=slots)


def start(barriers: Any, slots: int, *, native: bool) -> None:
  """Makes the barriers; by one warpgroup, before any other is told that it may go on."""
  if not native:
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
  def init(_, ref):
    first = arith.cmpi(arith.CmpIPredicate.eq, _thread(), _i32(0))
    for slot in range(slots):
      at = arith.addi(_shared(ref), _i32(8 * slot))
      ptx = f'mbarrier.init.shared::cta.b64 [$0], {_THREADS};'
      mgpu.inline_ptx(ptx, at, predicate=first, has_side_effects=True)
    mgpu.inline_ptx('fence.mbarrier_init.release.cluster;', has_side_effects=True)

  init(barriers)  # pyright: ignore[reportCallIssue]


def wait(barriers: Any, slot: jax.Array, turn: jax.Array, *, native: bool) -> None:
  """Until the copies of a slot's turn (0, 1, ...) have landed and wgmma may read them."""
  if not native:
    plgpu.barrier_wait(barriers.at[slot])
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR))
  def spin(_, ref, slot, turn):
    at = arith.addi(_shared(ref), arith.muli(_value(slot), _i32(8)))
    parity = arith.andi(_value(turn), _i32(1))
    ptx = (
      '{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; '
      '@!p bra again; }'
    )
    mgpu.inline_ptx(ptx, at, parity, has_side_effects=True, convergent=True)

  spin(barriers, slot, turn)  # pyright: ignore[reportCallIssue]
  # cp.async writes by the generic proxy, wgmma reads by the async one
  plgpu.commit_smem()


def gather(
  row_g: Any,
  index_g: Any,
  run: Run,
  slots_s: Any,
  barriers: Any,
  slot: jax.Array,
  *,
  native: bool,
) -> None:
  """Starts copying the rows of `run` to slots_s[slot], [2, 64, C / 2], and does not wait."""
  listed = run.at is not None
  if not native:
    j = jnp.minimum(jnp.arange(BLOCK), run.live - 1)
    if run.at is not None:
      j = index_g[...][run.at + j]
    rows = row_g[...][run.first + j]
    for half in range(2):
      columns = rows.shape[1] // 2
      slots_s[slot, half] = rows[:, half * columns : (half + 1) * columns]
    plgpu.barrier_arrive(barriers.at[slot])
    return

  refs = (row_g, slots_s, barriers, *((index_g,) if listed else ()))
  ref_types = (plgpu.RefType(), plgpu.RefType(TILING), *[plgpu.RefType()] * (len(refs) - 2))
  scalars = (slot, run.first, run.live, *((run.at,) if listed else ()))

  @plgpu.inline_mgpu(arg_types=(*ref_types, *[_SCALAR] * len(scalars)))
  def copies(_, rows, slots, bars, *rest):
    index, at = (rest[0], _value(rest[-1])) if listed else (None, None)
    slot, first, count = (_value(x) for x in rest[listed : listed + 3])
    _copies(rows, slots, bars, slot, first, count, index, at)

  copies(*refs, *scalars)


def _copies(rows, slots, bars, slot, first, count, index, at) -> None:
  i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
  wide = lambda x: arith.extsi(i64, x)
  warp = arith.shrui(_thread(), _i32(5))
  lane = arith.andi(_thread(), _i32(31))
  # 8 neighbouring lanes take 64 bytes of two rows, which the swizzle spreads over all banks
  parity = arith.andi(arith.shrui(lane, _i32(2)), _i32(1))
  chunk = arith.andi(lane, _i32(3))
  tile = arith.addi(arith.shli(warp, _i32(2)), arith.shrui(lane, _i32(3)))

  # each lane learns two row numbers; a warp shares its 64
  held = []
  for part in range(2):
    j = arith.minsi(arith.addi(lane, _i32(32 * part)), arith.subi(count, _i32(1)))
    if index is not None:
      pointer = arith.addi(
        llvm.ptrtoint(i64, mgpu.memref_ptr(index)),
        arith.muli(wide(arith.addi(at, j)), arith.constant(i64, 4)),
      )
      j = mgpu.inline_ptx(
        'ld.global.nc.b32 $0, [$1];', pointer, result_types=i32, has_side_effects=True
      )
    held.append(arith.addi(j, first))

  column = arith.addi(arith.muli(tile, _i32(64)), arith.muli(chunk, _i32(16)))
  source = arith.addi(llvm.ptrtoint(i64, mgpu.memref_ptr(rows)), wide(column))
  target = arith.addi(_shared(slots), arith.muli(slot, _i32(_SLOT_BYTES)))
  half = arith.muli(arith.shrui(tile, _i32(3)), _i32(_HALF_BYTES))
  in_band = arith.muli(arith.andi(tile, _i32(7)), _i32(512))
  inside = arith.addi(arith.addi(half, in_band), arith.muli(parity, _i32(64)))
  target = arith.addi(target, inside)
  pair_in_tile = [
    arith.addi(target, arith.addi(_i32(128 * p), arith.shli(arith.xori(chunk, _i32(p)), _i32(4))))
    for p in range(4)
  ]
  for pair in range(BLOCK // 2):
    lane_of_row = arith.addi(parity, _i32(2 * (pair % 16)))
    row = mgpu.inline_ptx(
      'shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;', held[pair // 16], lane_of_row,
      result_types=i32, has_side_effects=True, convergent=True,
    )  # fmt: skip
    address = arith.addi(source, arith.muli(wide(row), arith.constant(i64, 2 * WIDTH)))
    ptx = f'cp.async.cg.shared.global [$0+{pair // 4 * _BAND_BYTES}], [$1], 16;'
    mgpu.inline_ptx(ptx, pair_in_tile[pair % 4], address, has_side_effects=True)
  barrier = arith.addi(_shared(bars), arith.muli(slot, _i32(8)))
  ptx = 'cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];'
  mgpu.inline_ptx(ptx, barrier, has_side_effects=True)


def opaque(x: jax.Array, *, native: bool) -> jax.Array:
  """x, in a form that the compiler cannot move out of a loop.

  Addresses of operands are then made where they are used. Else all of them are made once, before
  the loop, and there are more of them than registers.
  """
  if not native:
    return x
  result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)

  @plgpu.inline_mgpu(arg_types=(_SCALAR,), return_type=result)
  def same(_, x):
    i32 = ir.IntegerType.get_signless(32)
    y = mgpu.inline_ptx('mov.b32 $0, $1;', _value(x), result_types=i32, has_side_effects=True)
    return fragmented_array.FragmentedArray.splat(y, (), is_signed=True)

  return same(x)  # pyright: ignore[reportCallIssue]


def accumulate(acc: jax.Array, product: Callable[[Any], Any], *, native: bool) -> Any:
  """acc plus the products that `product` adds to an accumulator."""
  if native:
    return pl.run_state(product)(plgpu.WGMMAAccumulatorRef.init(acc))

  def alone(ref):
    product(ref)
    return ref[...]

  rows, columns = acc.shape
  return acc + pl.run_scoped(alone, plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32))


def _i32(value: int) -> Any:
  return arith.constant(ir.IntegerType.get_signless(32), value)


def _value(scalar: Any) -> Any:
  return scalar.registers.item()


def _thread() -> Any:
  return arith.andi(mgpu.thread_idx(), _i32(_THREADS - 1))


def _shared(ref: Any) -> Any:
  """A 32-bit address of shared memory."""
  i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
  return arith.trunci(i32, llvm.ptrtoint(i64, mgpu.memref_ptr(ref)))
