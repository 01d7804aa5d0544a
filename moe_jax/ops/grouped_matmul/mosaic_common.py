"""What the two Hopper kernels share: how they are launched, and the order of their tiles."""

# E experts

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.backends import num_sms

# rows of one wgmma instruction
SLAB = 64


@dataclasses.dataclass(frozen=True)
class Launch:
  """One block per SM; with pair=2, neighbours form a cluster.

  Blocks of a pair take the same share of the work, whose unit is then a pair of tiles.
  """

  pair: int

  @property
  def multicast(self) -> str | None:
    """The axis over which a load common to a pair is shared."""
    return 'pair' if self.pair > 1 else None

  @property
  def _units(self) -> int:
    return max(1, num_sms() // self.pair)

  def index(self, i: jax.Array) -> jax.Array:
    """The i-th unit of work of this block."""
    return lax.axis_index('sm') + i * self._units

  def share(self, total: jax.Array | int) -> jax.Array:
    """How many units of work fall to this block."""
    return lax.max(pl.cdiv(total - lax.axis_index('sm'), self._units), 0)

  def of_pair(self, unit: jax.Array) -> jax.Array:
    return unit * 2 + lax.axis_index('pair') if self.pair > 1 else unit

  def set_registers(self, *, multiplies: bool) -> None:
    """An SM has registers for 504 a thread, if one warpgroup's threads are asked."""
    if multiplies:
      plgpu.set_max_registers(232, action='increase')
    else:
      plgpu.set_max_registers(40, action='decrease')

  def barrier(
    self, *, num_arrivals: int, num_barriers: int
  ) -> plgpu.Barrier | plgpu.ClusterBarrier:
    """For releasing a stage, which the pair must do together if one loads for both."""
    if self.pair > 1:
      return plgpu.ClusterBarrier(
        collective_axes=('pair',), num_arrivals=num_arrivals, num_barriers=num_barriers
      )
    return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=num_barriers)

  def kernel(
    self, body: Callable, *, out_type, scratch_types, name: str, into: jax.Array | None = None
  ) -> Callable:
    """With `into` the kernel updates that array, in place where nobody else holds it."""
    cluster = {'cluster': (2,), 'cluster_names': ('pair',)} if self.pair > 1 else {}
    call = plgpu.kernel(
      body,
      out_type=out_type if into is None else (),
      scratch_types=scratch_types,
      grid=(self._units,),
      grid_names=('sm',),
      num_threads=3,
      thread_name='warpgroup',
      kernel_name=name,
      compiler_params=plgpu.CompilerParams(approx_math=True),
      **cluster,
    )
    if into is None:
      return call

    def update(*args: jax.Array) -> jax.Array:
      ref = jax.new_ref(into)
      call(*args, ref)
      return jax.freeze(ref)

    return update


def smem_layout(columns: int, itemsize: int = 2) -> tuple:
  """The tiling and swizzle that TMA writes and wgmma reads without bank conflicts."""
  swizzle = plgpu.find_swizzle(columns * itemsize * 8)
  tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
  return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def ring_slot(step: jax.Array, stages: int) -> jax.Array:
  return lax.rem(step, jnp.int32(stages))


def fill_ring(
  steps: jax.Array, stages: int, empty: Any, copy: Callable[[jax.Array, jax.Array], None]
) -> None:
  """The loading warpgroup's part: copy(step, slot) as slots come free; in the end all are."""

  def load(i, _):
    slot = ring_slot(i, stages)

    @pl.when(i >= stages)
    def _():
      plgpu.barrier_wait(empty.at[slot])

    copy(i, slot)

  lax.fori_loop(0, steps, load, None)
  drain = lambda i, _: plgpu.barrier_wait(empty.at[ring_slot(i, stages)])
  lax.fori_loop(lax.max(steps - stages, 0), steps, drain, None)


def running_sum(count_E: jax.Array) -> jax.Array:
  """cumsum as one masked sum, which XLA fuses with what is around it."""
  e = jnp.arange(count_E.shape[0])
  return jnp.where(e[:, None] >= e, count_E, 0).sum(1, dtype=count_E.dtype)


def strip_order(
  i: jax.Array, num_rows: jax.Array | int, num_columns: int, strip: int
) -> tuple[jax.Array, jax.Array]:
  """Row and column of the i-th tile: strips of `strip` rows, down each strip's columns in turn.

  Every other strip runs right to left, so the columns at a strip's end are reused at once.
  """
  per_strip = jnp.int32(strip * num_columns)
  s, inside = lax.div(i, per_strip), lax.rem(i, per_strip)
  height = lax.min(jnp.int32(strip), num_rows - s * strip)
  row, column = s * strip + lax.rem(inside, height), lax.div(inside, height)
  return row, jnp.where(lax.rem(s, 2) == 0, column, num_columns - 1 - column)
