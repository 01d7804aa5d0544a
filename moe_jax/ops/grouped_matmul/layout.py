"""Where each expert's rows lie, and the small facts every backend needs about that.

Expert e owns rows offsets[e] to offsets[e+1] (the last one to the end), of which the first
sizes[e] are real. Compact rows are offsets = cumsum(sizes) - sizes; a caller that writes the rows
itself may leave gaps instead, so that groups start on round numbers.
"""

# R rows  E experts

import jax
import jax.numpy as jnp

from moe_jax.ops.varying import match_vma as match_vma


def padded_offsets(sizes_E: jax.Array, multiple: int) -> jax.Array:
  """First row of each expert when every group starts on a multiple of `multiple`.

  The rows needed are at most sum(sizes) + E * (multiple - 1), rounded up.
  """
  taken_E = -(-sizes_E // multiple) * multiple
  return (jnp.cumsum(taken_E) - taken_E).astype(jnp.int32)


def compact_offsets(sizes_E: jax.Array) -> jax.Array:
  return (jnp.cumsum(sizes_E) - sizes_E).astype(jnp.int32)


def expert_of_row(num_rows: int, offsets_E: jax.Array) -> jax.Array:
  """The owner of each row. Comparing with every offset beats a binary search on accelerators."""
  row_R = jnp.arange(num_rows, dtype=jnp.int32)
  # an empty expert shares its offset with its successor, and the last of equals is the owner
  owner_R = jnp.searchsorted(offsets_E, row_R, side='right', method='compare_all') - 1
  return jnp.maximum(owner_R, 0)


def check_into(into: jax.Array | None, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> None:
  """What a gradient is added to must look like the gradient."""
  if into is not None and (into.shape != shape or into.dtype != dtype):
    raise ValueError(
      f'into is {into.dtype}{into.shape}, must be {jnp.dtype(dtype)}{shape} as the gradient is.'
    )
