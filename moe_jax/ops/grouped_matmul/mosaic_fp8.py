"""What the two FP8 kernels for Hopper share: the pipeline of one tile of 128 x 128 sums.

  block        128 of the contracted dimension, over which each operand has one scale per row
  unit         64 x 128 sums of one block in a fresh accumulator of the tensor cores, scaled and
               added to float32 registers ("promoted") when it is complete
  warpgroups   two, each with 64 of the tile's rows, multiply their next unit while they promote
               the last: registers for two units and the sums, 192 of 232. A third loads
  round        4 blocks: each has its own slot in shared memory, always the same, and their scales
               come together. Fixed slots make barriers and addresses constants, for the sake of
               the last warpgroup, which has 512 cycles for all it takes to load one block

Warpgroups read the scales through another proxy than TMA writes them; a fence a round keeps TMA
from overtaking them.

A unit reads 24 KiB of shared memory in the 256 cycles it multiplies, and TMA writes 16 KiB in that
time: 125% of what shared memory moves. That, then the power limit, is the bound.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.grouped_matmul.mosaic_common import SLAB, Launch, smem_layout

BLOCK = 128
# blocks in a round
ROUND = 4


class Pipe(NamedTuple):
  """The shared memory and the barriers of one kernel; a_s and b_s are [ROUND, 128, 128]."""

  a_s: Any
  b_s: Any
  full: Any
  empty: Any
  # of any shape, with a slot for each of two rounds
  scales_s: Any
  scales_full: Any
  scales_empty: Any


class Progress(NamedTuple):
  """Rounds that went through the pipe so far, and slots that any of them used."""

  rounds: jax.Array
  slots: jax.Array

  def after(self, num_blocks: jax.Array) -> 'Progress':
    return Progress(self.rounds + num_rounds(num_blocks), lax.max(self.slots, num_blocks))


def start() -> Progress:
  return Progress(jnp.int32(0), jnp.int32(0))


def num_rounds(num_blocks: jax.Array) -> jax.Array:
  return lax.div(num_blocks + (ROUND - 1), jnp.int32(ROUND))


def scratch(launch: Launch, dtype: jnp.dtype, scales: dict[str, Any]) -> Pipe:
  operand = lambda rows: plgpu.SMEM((ROUND, rows, BLOCK), dtype, transforms=smem_layout(BLOCK, 1))
  readers = 2
  return Pipe(
    operand(readers * SLAB),
    operand(BLOCK),
    plgpu.Barrier(num_arrivals=2, num_barriers=ROUND),
    launch.barrier(num_arrivals=readers, num_barriers=ROUND),
    scales,
    plgpu.Barrier(num_arrivals=2, num_barriers=2),
    launch.barrier(num_arrivals=readers, num_barriers=2),
  )


def contract(
  pipe: Pipe,
  done: Progress,
  num_blocks: jax.Array,
  sums: Any,
  promote: Callable[[Any, jax.Array, jax.Array, jax.Array | int], Any],
  *,
  overlap: bool,
  unroll: bool,
) -> Any:
  """Multiplies all blocks of a tile: sums = promote(sums, product, slot and index of scales).

  overlap: the next unit is multiplied during a promotion; needs registers for both, and a number
    of blocks that makes whole rounds.
  unroll: a round, as `overlap` does; it costs registers for the addresses of all slots.
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

  whole = lax.div(num_blocks, jnp.int32(ROUND)) if overlap or unroll else 0
  if overlap or unroll:
    sums = lax.fori_loop(0, whole, lambda r, sums: one_round(r, [*range(ROUND)], sums), sums)
  if overlap:
    return sums
  rest = lambda r, sums: one_round(r, lax.min(num_blocks - r * ROUND, ROUND), sums)
  return lax.fori_loop(whole, num_rounds(num_blocks), rest, sums)


def pass_by(pipe: Pipe, done: Progress, num_blocks: jax.Array) -> None:
  """For a warpgroup with nothing to multiply in a tile; releases in the order of `contract`."""

  def block(slot, _):
    plgpu.barrier_wait(pipe.full.at[slot])
    plgpu.barrier_arrive(pipe.empty.at[slot])

  def one_round(r, _):
    scale_slot = lax.rem(done.rounds + r, jnp.int32(2))
    plgpu.barrier_wait(pipe.scales_full.at[scale_slot])
    lax.fori_loop(0, lax.min(num_blocks - r * ROUND, ROUND), block, None)
    plgpu.barrier_arrive(pipe.scales_empty.at[scale_slot])

  lax.fori_loop(0, num_rounds(num_blocks), one_round, None)


def load(
  pipe: Pipe,
  done: Progress,
  num_blocks: jax.Array,
  copy_block: Callable[[jax.Array, int, Any], None],
  copy_scales: Callable[[jax.Array, jax.Array, Any], None],
) -> None:
  """Loads all blocks of a tile; both functions take a first block, a slot, and the barrier."""

  def one_round(r, _):
    scale_slot = lax.rem(done.rounds + r, jnp.int32(2))

    @pl.when(done.rounds + r >= 2)
    def _():
      plgpu.barrier_wait(pipe.scales_empty.at[scale_slot])

    copy_scales(r * ROUND, scale_slot, pipe.scales_full.at[scale_slot])
    for slot in range(ROUND):

      @pl.when(r * ROUND + slot < num_blocks)
      def _(slot=slot):
        used = (r > 0) | (slot < done.slots)
        pl.when(used)(lambda: plgpu.barrier_wait(pipe.empty.at[slot]))
        copy_block(r * ROUND + slot, slot, pipe.full.at[slot])

  lax.fori_loop(0, num_rounds(num_blocks), one_round, None)


def drain(pipe: Pipe, done: Progress) -> None:
  """The last releases must have arrived before the block, and its barriers, may end."""
  for slot in range(ROUND):
    pl.when(slot < done.slots)(lambda slot=slot: plgpu.barrier_wait(pipe.empty.at[slot]))

  def scales(r, _):
    plgpu.barrier_wait(pipe.scales_empty.at[lax.rem(r, jnp.int32(2))])

  lax.fori_loop(lax.max(done.rounds - 2, 0), done.rounds, scales, None)
