"""What the Hopper kernels of attention share.

Each runs blocks of three warpgroups over a grid of (row of the batch, head, tile): two multiply,
each for 64 rows of the tile, and a third only issues TMA loads into rings of stages.
"""

# B batch  S sequence  H query heads  G key-value heads  N keys or queries a step

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

# rows of one wgmma instruction, and of a warpgroup
SLAB = 64
# rows of a tile
ROWS = 2 * SLAB
# Mosaic's own named barriers come before this one
_FIRST_TURN = 4
ACC = plgpu.WGMMAAccumulatorRef
MATRIX = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tile:
  # keys or queries that a tile meets at a time, and how many such steps are loaded ahead
  step: int
  stages: int = 2


@dataclasses.dataclass(frozen=True)
class Turns:
  """Two warpgroups taking turns: each waits until the other has passed on.

  By the chip's named barriers, one instruction a warp, and not by barriers in shared memory, at
  which each thread arrives; only the interpreter is given those.
  """

  group: jax.Array
  barriers: Any

  def wait(self) -> None:
    if self.barriers is None:
      _named_barrier('sync', _FIRST_TURN + self.group)
    else:
      plgpu.barrier_wait(self.barriers.at[self.group])

  def pass_on(self) -> None:
    if self.barriers is None:
      _named_barrier('arrive', _FIRST_TURN + 1 - self.group)
    else:
      plgpu.barrier_arrive(self.barriers.at[1 - self.group])


def _named_barrier(operation: str, number: jax.Array) -> None:
  def emit(_, n):
    # 256: the threads of both warpgroups
    mgpu.utils.inline_ptx(f'bar.{operation} $0, 256;', n.registers[()])

  run: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))(emit)
  run(number)


def await_warpgroup() -> None:
  """Before a write to what all of a warpgroup have read: Mosaic puts a barrier behind this wait."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def tiled(shape: tuple[int, ...], dtype: Any):
  """Shared memory that TMA writes and wgmma reads without bank conflicts."""
  tiling = plgpu.TilingTransform((8, 64))  # pyright: ignore[reportAbstractUsage]
  swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
  return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def in_eights(a: jax.Array, **how: Any) -> jax.Array:
  """Pads a sequence, the second dimension, to a multiple of 8, as TMA wants rows."""
  return jnp.pad(a, ((0, 0), (0, -a.shape[1] % 8)) + ((0, 0),) * (a.ndim - 2), **how)


def whole_tiles(a: jax.Array, mode: str = 'edge') -> jax.Array:
  """Pads the last dimension, along the sequence, to whole tiles."""
  return jnp.pad(a, ((0, 0),) * (a.ndim - 1) + ((0, -a.shape[-1] % ROWS),), mode=mode)


def launch(kernel: Callable, *, grid: tuple[int, int, int], name: str, **types) -> Callable:
  return plgpu.kernel(
    kernel,
    grid=grid,
    grid_names=('row', 'head', 'tile'),
    num_threads=3,
    thread_name='warpgroup',
    kernel_name=name,
    compiler_params=compiler_params(),
    **types,
  )


def compiler_params() -> Any:
  """No barriers of the compiler's own: kernels place those that they need."""
  return plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
  )


def index(shape: tuple[int, ...], dim: int) -> jax.Array:
  return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=MATRIX)


def along_rows(x: jax.Array, columns: int) -> jax.Array:
  return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def along_columns(x: jax.Array, rows: int) -> jax.Array:
  return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def by_row(ref) -> jax.Array:
  """A row's number for each row of a warpgroup, from device memory."""
  return plgpu.load(ref, layout=BY_ROW, optimized=False)


def add_product(acc_ref, a: jax.Array, b_ref, scratch_ref) -> None:
  """acc += a @ b, with `a` in registers, or for the interpreter through `scratch_ref`."""
  if scratch_ref is None:
    plgpu.wgmma(acc_ref, a, b_ref)
  else:
    scratch_ref[...] = a
    plgpu.commit_smem()
    plgpu.wgmma(acc_ref, scratch_ref, b_ref)


def accumulated(run: Callable, *sums: jax.Array) -> Any:
  """The sums after `run` has added products to them, in registers."""
  return pl.run_state(lambda refs: run(*refs))(tuple(ACC.init(x) for x in sums))


def load_keys(refs, rings, *, at, begin: jax.Array, end: jax.Array) -> None:
  """The loading warpgroup of a kernel that walks over the blocks [begin, end) of keys and values.

  Args:
    refs: keys and values in device memory, [B, S, G, width].
    rings: for each of them its stages in shared memory and their full and empty barriers.
    at: row of the batch and key head.
  """
  (b, g), (stages, num_keys) = at, rings[0][0].shape[:2]
  slot_of = lambda step: lax.rem(step - begin, jnp.int32(stages))

  def load(step, _):
    slot, keys = slot_of(step), pl.ds(step * num_keys, num_keys)
    for ref, (ring, full, empty) in zip(refs, rings, strict=True):

      @pl.when(step - begin >= stages)
      def _(empty=empty):
        plgpu.barrier_wait(empty.at[slot])

      # past the last row TMA writes zeros
      plgpu.copy_gmem_to_smem(ref.at[b, keys, g], ring.at[slot], full.at[slot])

  lax.fori_loop(begin, end, load, None)

  # the last releases must have arrived before the block, and its barriers, may end
  def drain(step, _):
    for _, _, empty in rings:
      plgpu.barrier_wait(empty.at[slot_of(step)])

  lax.fori_loop(lax.max(begin, end - stages), end, drain, None)
