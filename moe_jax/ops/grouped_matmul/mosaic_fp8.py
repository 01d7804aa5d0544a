"""What the two FP8 kernels for Hopper share: how operands and scales come to shared memory.

  block        128 of the contracted dimension, over which each operand has one scale per row
  unit         64 x 128 sums of one block in a fresh accumulator of the tensor cores, scaled and
               added to float32 registers ("promoted") when it is complete
  warpgroups   two, each with 64 of the tile's rows, multiply; a third loads
  round        4 blocks: each has its own slot in shared memory, always the same, and their scales
               come together. Fixed slots make barriers and addresses constants, for the sake of
               the last warpgroup, which has 512 cycles for all it takes to load one block

Warpgroups read the scales through another proxy than TMA writes them; a fence a round keeps TMA
from overtaking them.
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
  """The shared memory and the barriers of one kernel: a_s [ROUND, 128, 128], b_s [ROUND, N, 128].

  `full` has a barrier for each slot; or, if warpgroups take turns, one for each warpgroup and slot.
  """

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


def scratch(
  launch: Launch, dtype: jnp.dtype, columns: int, scales: dict[str, Any], *, turns: bool = False
) -> Pipe:
  operand = lambda rows: plgpu.SMEM((ROUND, rows, BLOCK), dtype, transforms=smem_layout(BLOCK, 1))
  readers = 2
  return Pipe(
    operand(readers * SLAB),
    operand(columns),
    plgpu.Barrier(num_arrivals=2, num_barriers=ROUND * (readers if turns else 1)),
    launch.barrier(num_arrivals=readers, num_barriers=ROUND),
    scales,
    plgpu.Barrier(num_arrivals=2, num_barriers=2),
    launch.barrier(num_arrivals=readers, num_barriers=2),
  )


def load(
  pipe: Pipe,
  done: Progress,
  num_blocks: jax.Array,
  operands: Callable[[jax.Array], tuple[Any, Any]],
  copy_scales: Callable[[jax.Array, jax.Array, Any], None],
  *,
  multicast: str | None = None,
) -> None:
  """Loads all blocks of a tile.

  operands: of a block, the tile's rows and columns in it.
  copy_scales: of a round's first block, a slot for scales and its barrier; starts the copies.
  multicast: the axis over which the columns are shared.
  """

  def copy_block(block, slot):
    rows, columns = operands(block)
    readers = pipe.full.shape[0] // ROUND
    for reader in range(readers):
      own = pl.ds(reader * (pipe.a_s.shape[1] // readers), pipe.a_s.shape[1] // readers)
      ready = pipe.full.at[reader * ROUND + slot]
      plgpu.copy_gmem_to_smem(rows.at[own], pipe.a_s.at[slot, own], ready)
    plgpu.copy_gmem_to_smem(
      columns, pipe.b_s.at[slot], pipe.full.at[slot], collective_axes=multicast
    )

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
        copy_block(r * ROUND + slot, slot)

  lax.fori_loop(0, num_rounds(num_blocks), one_round, None)


def drain(pipe: Pipe, done: Progress) -> None:
  """The last releases must have arrived before the block, and its barriers, may end."""
  for slot in range(ROUND):
    pl.when(slot < done.slots)(lambda slot=slot: plgpu.barrier_wait(pipe.empty.at[slot]))

  def scales(r, _):
    plgpu.barrier_wait(pipe.scales_empty.at[lax.rem(r, jnp.int32(2))])

  lax.fori_loop(lax.max(done.rounds - 2, 0), done.rounds, scales, None)
