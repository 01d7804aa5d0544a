"""Rows by index on their way into shared memory, so that a spread copy of tokens is never made.

TMA moves consecutive rows only. The loading warpgroup instead issues cp.async itself: each of its
threads copies 16 bytes at a time from the tokens whose numbers it holds to where the 128-byte
swizzle puts them, and the copies of a slot arrive on a barrier of its own (mosaic_inline.py).
The interpreter has loops over rows instead.
"""

# R rows  T tokens  D width

import dataclasses
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

from moe_jax.ops import mosaic_inline as inline

_ROWS_A_PASS = 16


@dataclasses.dataclass(frozen=True)
class Gather:
  """Loads of rows x columns bfloat16 of tokens into the slots of a ring.

  Row numbers past the last are as the last, and tokens likewise: who reads such rows ignores them.
  """

  rows: int
  columns: int
  slots: int
  native: bool

  @property
  def _arrivals(self) -> inline.Arrivals:
    return inline.Arrivals(self.slots, self.native)

  def scratch(self) -> tuple[Any, Any]:
    """What the methods below take as `barriers`: one a slot, and that they are there."""
    return self._arrivals.scratch(), plgpu.Barrier(num_arrivals=1)

  def make_ready(self, barriers: Any) -> None:
    """By the loading warpgroup, first of all; the others wait for it."""
    self._arrivals.init(barriers[0])
    plgpu.barrier_arrive(barriers[1])

  def wait_ready(self, barriers: Any) -> None:
    plgpu.barrier_wait(barriers[1])

  def wait(self, barriers: Any, slot: jax.Array, round_: jax.Array) -> None:
    """Until the slot has been filled round_ + 1 times."""
    self._arrivals.wait(barriers[0], slot, round_)

  def drain(self) -> None:
    inline.drain(native=self.native)

  @property
  def _passes(self) -> int:
    return self.rows // _ROWS_A_PASS

  def hold(self, token_g: Any, first: jax.Array) -> Any:
    """The tokens of rows first, first + 1, .. of token_g, [R], each where its thread has it."""
    if not self.native:
      return first
    num_rows, passes = token_g.shape[0], self._passes
    shape = (128 * passes,)
    layout = plgpu.Layout.WG_STRIDED(shape, passes)
    returns = plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=layout)

    @inline.inlined(plgpu.RefType(), inline.SCALAR, returns=returns)
    def hold(_, ref, first):
      i32 = ir.IntegerType.get_signless(32)
      base = mgpu_utils.memref_ptr(ref)
      own = arith.addi(first.registers.item(), arith.divui(inline.thread(), inline.i32(8)))
      held = llvm.mlir_undef(ir.VectorType.get((passes,), i32))
      for n in range(passes):
        row = arith.addi(own, inline.i32(n * _ROWS_A_PASS))
        row = arith.minsi(row, inline.i32(num_rows - 1))
        at = inline.byte_at(base, arith.muli(row, inline.i32(4)))
        token = mgpu_utils.inline_ptx(
          'ld.global.nc.b32 $0, [$1];', at, result_types=i32, has_side_effects=True
        )
        held = vector.insert(token, held, dynamic_position=[], static_position=[n])
      return mgpu.FragmentedArray(
        _registers=np.array([held], dtype=object),
        _layout=mgpu.WGStridedFragLayout(shape, passes),
        _is_signed=True,
      )

    return hold(token_g, first)

  def start(
    self, x_g: Any, token_g: Any, held: Any, x_s: Any, barriers: Any, column: Any, slot: Any
  ) -> None:
    """Starts copying columns from `column` on of the held tokens into x_s[slot]; does not wait."""
    if not self.native:
      self._copy_rows(x_g, token_g, held, x_s, barriers[0], column, slot)
      return
    num_tokens, width = x_g.shape
    passes, tiles = self._passes, self.columns // inline.TILE
    shape = (128 * passes,)
    kinds = (
      plgpu.RefType(),
      plgpu.Layout.WG_STRIDED(shape, passes),
      plgpu.RefType(inline.TRANSFORMS),
      plgpu.RefType(),
      inline.SCALAR,
      inline.SCALAR,
    )

    @inline.inlined(*kinds)
    def start(_, x, held, ring, barriers, column, slot):
      i64 = ir.IntegerType.get_signless(64)
      (tokens,) = held.registers.flat
      column, slot = column.registers.item(), slot.registers.item()
      thread = inline.thread()
      chunk, inside = arith.remui(thread, inline.i32(8)), arith.divui(thread, inline.i32(8))
      # in bytes, of the thread's 16 in the first tile of the first token
      source = arith.addi(arith.muli(column, inline.i32(2)), arith.muli(chunk, inline.i32(16)))
      source = inline.byte_at(mgpu_utils.memref_ptr(x), source)
      # [slots, groups of 8 rows, tiles, 8, 64] as the tiling has it
      group, lane = arith.divui(inside, inline.i32(8)), arith.remui(inside, inline.i32(8))
      swizzled = arith.muli(arith.xori(chunk, lane), inline.i32(16))
      target = arith.addi(
        arith.muli(slot, inline.i32(self.rows * self.columns * 2)),
        arith.addi(arith.muli(group, inline.i32(tiles * 1024)), arith.muli(lane, inline.i32(128))),
      )
      target = inline.byte_at(mgpu_utils.memref_ptr(ring), arith.addi(target, swizzled))
      for n in range(passes):
        token = vector.extract(tokens, dynamic_position=[], static_position=[n])
        token = arith.minsi(token, inline.i32(num_tokens - 1))
        offset = arith.muli(arith.extui(i64, token), mgpu_utils.c(2 * width, i64))
        row = inline.byte_at(source, offset)
        for t in range(tiles):
          mgpu_utils.inline_ptx(
            'cp.async.cg.shared.global.L2::128B [$0], [$1], 16;',
            inline.byte_at(target, inline.i32((n * _ROWS_A_PASS // 8 * tiles + t) * 1024)),
            inline.byte_at(row, inline.i32(t * inline.TILE * 2)),
            has_side_effects=True,
          )
      at = inline.byte_at(mgpu_utils.memref_ptr(barriers), arith.muli(slot, inline.i32(8)))
      mgpu_utils.inline_ptx(
        'cp.async.mbarrier.arrive.noinc.shared.b64 [$0];', at, has_side_effects=True
      )

    start(x_g, held, x_s, barriers[0], jnp.int32(column), jnp.int32(slot))

  def _copy_rows(self, x_g, token_g, first, x_s, barriers, column, slot) -> None:
    def copy(i, _):
      token = token_g[lax.min(first + i, token_g.shape[0] - 1)]
      x_s[slot, i] = x_g[lax.min(token, x_g.shape[0] - 1), pl.ds(column, self.columns)]

    lax.fori_loop(0, self.rows, copy, None)
    plgpu.commit_smem()
    plgpu.barrier_arrive(barriers.at[slot])
