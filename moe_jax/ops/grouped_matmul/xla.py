"""Grouped matmul as a batched matmul over blocks of rows: correct on every device.

Each expert's rows are cut into blocks of M, the last one padded, so that every block has one
expert and the whole is [N, M, D] x [N, D, F]. Rows enter and leave by gathers (a scatter-add would
make the result depend on the order of the threads), and the number of blocks is a static bound, so
sizes may be traced values. jax.lax.ragged_dot has the same meaning but is expanded to a dense
product over all experts on CPU and NVIDIA: 80 ms against 2.5 ms for 16384 rows, 16 experts of
128 x 96, on two cores.

Each block needs its expert's matrix beside it. The blocks go through in batches that hold at most
_WEIGHT_BYTES of such copies, so large experts cost little more memory than the operands.
"""

# R rows  D in  F out  E experts  N blocks  M rows in a block

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops.grouped_matmul import layout

_WEIGHT_BYTES = 64 * 2**20


class _Blocks(NamedTuple):
  expert_N: jax.Array
  row_NM: jax.Array
  # whether that row is the expert's own, not padding
  live_NM: jax.Array


def _block_rows(num_rows: int, num_experts: int) -> int:
  """A quarter of an expert's mean share: padding costs about an eighth, and blocks stay few."""
  share = max(1, num_rows // (4 * num_experts))
  return min(512, max(8, 1 << (share.bit_length() - 1)))


def _first_block(sizes_E: jax.Array, m: int) -> jax.Array:
  count_E = -(-sizes_E // m)
  return jnp.cumsum(count_E) - count_E


def _blocks(num_rows: int, offsets_E: jax.Array, sizes_E: jax.Array, m: int) -> _Blocks:
  num_experts = sizes_E.shape[0]
  # at most min(E, R) experts have rows, and each wastes at most m - 1 slots
  n = (num_rows + min(num_experts, num_rows) * (m - 1)) // m
  first_E = _first_block(sizes_E, m)
  # an empty expert shares its first block with its successor; blocks past the end fall to the last
  expert_N = jnp.searchsorted(first_E, jnp.arange(n), side='right', method='compare_all') - 1
  start_N = (jnp.arange(n) - first_E[expert_N]) * m
  inside_NM = start_N[:, None] + jnp.arange(m)
  return _Blocks(
    expert_N,
    row_NM=offsets_E[expert_N][:, None] + inside_NM,
    live_NM=inside_NM < sizes_E[expert_N][:, None],
  )


def _take(x_RD: jax.Array, row_M: jax.Array, live_M: jax.Array) -> jax.Array:
  # a select, not a product: rows of nobody may hold NaN
  return jnp.where(live_M[:, None], x_RD.at[row_M].get(mode='clip'), 0)


def forward(
  x_RD: jax.Array,
  w_EDF: jax.Array,
  offsets_E: jax.Array,
  sizes_E: jax.Array,
  *,
  transpose_w: bool = False,
) -> jax.Array:
  """x[r] @ w[e], or x[r] @ w[e].T with `transpose_w` (x is then [R, F]); other rows are zero."""
  num_rows, num_experts = x_RD.shape[0], w_EDF.shape[0]
  m = _block_rows(num_rows, num_experts)
  contract = 'mf,df->md' if transpose_w else 'md,df->mf'

  def multiply(block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    expert, row_M, live_M = block
    own_MD = _take(x_RD, row_M, live_M)
    y_MF = jnp.einsum(contract, own_MD, w_EDF[expert], preferred_element_type=jnp.float32)
    return y_MF.astype(x_RD.dtype)

  blocks = _blocks(num_rows, offsets_E, sizes_E, m)
  batch = max(1, _WEIGHT_BYTES * num_experts // max(1, w_EDF.nbytes))
  batch = min(batch, blocks.expert_N.shape[0])
  y_NMF = jax.lax.map(multiply, tuple(blocks), batch_size=batch)

  owner_R = layout.expert_of_row(num_rows, offsets_E)
  inside_R = jnp.arange(num_rows) - offsets_E[owner_R]
  slot_R = _first_block(sizes_E, m)[owner_R] * m + inside_R
  live_R = (inside_R >= 0) & (inside_R < sizes_E[owner_R])
  return _take(y_NMF.reshape(-1, y_NMF.shape[-1]), slot_R, live_R)


def weight_grad(
  x_RD: jax.Array,
  dy_RF: jax.Array,
  offsets_E: jax.Array,
  sizes_E: jax.Array,
  *,
  dtype: jnp.dtype,
  into_EDF: jax.Array | None = None,
) -> jax.Array:
  """x[rows of e].T @ dy[rows of e] for every expert; exact zeros for an empty one.

  `into` is added to.

  Blocks add into their expert one after the other: as fast as any parallel form measured on CPU
  (3.0 ms where a one-hot contraction of per-block products takes 3.4), and no per-block product
  is kept.
  """
  num_rows, num_experts = x_RD.shape[0], sizes_E.shape[0]
  blocks = _blocks(num_rows, offsets_E, sizes_E, _block_rows(num_rows, num_experts))

  def add(dw_EDF: jax.Array, block: _Blocks) -> tuple[jax.Array, None]:
    expert, row_M, live_M = block
    part_DF = jnp.einsum(
      'md,mf->df',
      _take(x_RD, row_M, live_M),
      _take(dy_RF, row_M, live_M),
      preferred_element_type=jnp.float32,
    )
    return dw_EDF.at[expert].add(part_DF), None

  if into_EDF is None:
    into_EDF = jnp.zeros((num_experts, x_RD.shape[1], dy_RF.shape[1]), jnp.float32)
  start_EDF, _ = layout.match_vma(into_EDF.astype(jnp.float32), x_RD)
  return jax.lax.scan(add, start_EDF, blocks)[0].astype(dtype)
