"""What the two Hopper kernels share."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

# rows of one wgmma instruction
SLAB = 64


def num_sms() -> int:
  """Blocks to launch; one suffices in the interpreter, where there is no GPU."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.num_cores:
    return device.num_cores
  return jax.devices()[0].core_count if jax.default_backend() == 'gpu' else 1


def smem_layout(columns: int, itemsize: int = 2) -> tuple:
  """The tiling and swizzle that TMA writes and wgmma reads without bank conflicts."""
  swizzle = plgpu.find_swizzle(columns * itemsize * 8)
  tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
  return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def ring_slot(step: jax.Array, stages: int) -> jax.Array:
  return lax.rem(step, jnp.int32(stages))


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
