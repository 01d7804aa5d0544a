"""What the Hopper kernels of attention share.

Each runs blocks of three warpgroups over a grid of (row of the batch, head, tile): two multiply,
each for 64 rows of the tile, and a third only issues TMA loads into rings of stages.
"""

# B batch  S sequence  H query heads  G key-value heads  N keys or queries a step

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# rows of one wgmma instruction, and of a warpgroup
SLAB = 64
# rows of a tile
ROWS = 2 * SLAB
ACC = plgpu.WGMMAAccumulatorRef
MATRIX = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


def tiled(shape: tuple[int, ...], dtype: Any):
  """Shared memory that TMA writes and wgmma reads without bank conflicts."""
  tiling = plgpu.TilingTransform((8, 64))  # pyright: ignore[reportAbstractUsage]
  swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
  return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def launch(kernel: Callable, *, grid: tuple[int, int, int], name: str, **types) -> Callable:
  return plgpu.kernel(
    kernel,
    grid=grid,
    grid_names=('row', 'head', 'tile'),
    num_threads=3,
    thread_name='warpgroup',
    kernel_name=name,
    # no barriers of the compiler's own: no thread both reads and writes any shared memory before
    # the loops are over
    compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
    ),
    **types,
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


def load_keys(refs, rings, *, at, end: jax.Array, num_blocks: jax.Array) -> None:
  """The loading warpgroup of a kernel that walks down `num_blocks` blocks of keys, from `end`.

  Args:
    refs: keys and values in device memory, [B, S, G, width].
    rings: for each of them its stages in shared memory and their full and empty barriers.
    at: row of the batch and key head.
  """
  (b, g), (stages, num_keys) = at, rings[0][0].shape[:2]
  slot_of = lambda i: lax.rem(i, jnp.int32(stages))

  def load(i, _):
    slot, keys = slot_of(i), pl.ds((end - 1 - i) * num_keys, num_keys)
    for ref, (ring, full, empty) in zip(refs, rings, strict=True):

      @pl.when(i >= stages)
      def _(empty=empty):
        plgpu.barrier_wait(empty.at[slot])

      # past the last row TMA writes zeros
      plgpu.copy_gmem_to_smem(ref.at[b, keys, g], ring.at[slot], full.at[slot])

  # there is a first block, and it need not wait until `num_blocks` has come from device memory
  load(jnp.int32(0), None)
  lax.fori_loop(1, num_blocks, load, None)

  # the last releases must have arrived before the block, and its barriers, may end
  def drain(i, _):
    for _, _, empty in rings:
      plgpu.barrier_wait(empty.at[slot_of(i)])

  lax.fori_loop(lax.max(0, num_blocks - stages), num_blocks, drain, None)
