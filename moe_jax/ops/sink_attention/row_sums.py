"""Sums of scattered rows without atomics: each row's parts are read by one program, in order.

A stable sort of (row, part) pairs is a radix sort on the GPU, linear in their number. The bound of
the sums is reading every part once from device memory.
"""

# P parts  R rows  C width

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton

_PARTS_A_STEP = 32


def inverse(row_P: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
  """Parts by their row, in order, [P], and where each row's begin, [R+1]; row R is nobody's."""
  row_P, part_P = row_P.astype(jnp.int32), jnp.arange(row_P.size, dtype=jnp.int32)
  _, order_P = lax.sort((row_P, part_P), num_keys=1, is_stable=True)
  # sums of whole numbers do not depend on their order
  count_R = jnp.zeros(num_rows, jnp.int32).at[row_P].add(1, mode='drop')
  return order_P, jnp.pad(jnp.cumsum(count_R, dtype=jnp.int32), (1, 0))


def add_parts(
  total_RC: jax.Array,
  part_PC: jax.Array,
  order_P: jax.Array,
  begin: jax.Array,
) -> jax.Array:
  """total, float32, plus the sum of each row's parts."""
  (R, C), step = total_RC.shape, _PARTS_A_STEP
  if jax.default_backend() != 'gpu' or C & (C - 1):
    row_P = jnp.searchsorted(begin, jnp.arange(order_P.size), side='right') - 1
    # parts of nobody may hold anything
    part_PC = jnp.where(row_P[:, None] < R, part_PC[order_P], 0).astype(jnp.float32)
    return total_RC + jax.ops.segment_sum(part_PC, row_P, R + 1, indices_are_sorted=True)[:R]

  def kernel(total_g, part_g, order_g, begin_g, out_g):
    row = pl.program_id(0)
    first, end = begin_g[row], begin_g[row + 1]
    column = jnp.broadcast_to(jnp.arange(C, dtype=jnp.int32)[None], (step, C))

    def add(i, total):
      at = first + i * step + jnp.arange(step, dtype=jnp.int32)
      part = plt.load(order_g.at[at], mask=at < end, other=0)
      index = jnp.broadcast_to(part[:, None], (step, C)), column
      mask = jnp.broadcast_to((at < end)[:, None], (step, C))
      parts = plt.load(part_g.at[index], mask=mask, other=0.0)
      return total + parts.astype(jnp.float32).sum(0)

    total = lax.fori_loop(
      0, pl.cdiv(end - first, step), add, plt.load(total_g.at[row, pl.ds(0, C)])
    )
    plt.store(out_g.at[row, pl.ds(0, C)], total)

  out = jax.ShapeDtypeStruct(total_RC.shape, jnp.float32)
  return pallas_triton.call(
    kernel,
    total_RC,
    part_PC,
    order_P,
    begin,
    grid=(R,),
    out=out,
    num_warps=4,
    aliases={0: 0},
  )
