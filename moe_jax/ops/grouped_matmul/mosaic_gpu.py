"""Hopper backend: which shapes it takes, which tiles it uses. The kernels are in mosaic_*.py."""

# R rows  D in  F out  E experts

import jax
import jax.numpy as jnp

from moe_jax.ops.grouped_matmul import layout, mosaic_rows, mosaic_weights, tiles


def on_hopper() -> bool:
  device = jax.devices()[0]
  return device.platform == 'gpu' and device.compute_capability == '9.0'


def unsupported(dtype: jnp.dtype, num_rows: int, d: int, f: int) -> str | None:
  """Why these kernels cannot run here, in one line, or None if they can."""
  if not on_hopper():
    return f'needs a Hopper GPU (compute capability 9.0), this is {jax.devices()[0].device_kind}'
  if dtype != jnp.bfloat16:
    return f'needs bfloat16 rows, got {dtype}'
  if num_rows % 8 or not num_rows:
    return f'needs a multiple of 8 rows (TMA moves 8 at a time), got {num_rows}'
  if d % 64 or f % 64:
    return f'needs widths that are multiples of 64 (one swizzled row of wgmma), got {d} x {f}'
  return None


def forward(
  x_RD: jax.Array,
  w_EDF: jax.Array,
  offsets_E: jax.Array,
  sizes_E: jax.Array,
  *,
  transpose_w: bool = False,
  tile: tiles.Tile | None = None,
) -> jax.Array:
  """As xla.forward: x[r] @ w[e], or x[r] @ w[e].T with `transpose_w`."""
  (num_rows, k), num_experts = x_RD.shape, w_EDF.shape[0]
  n = w_EDF.shape[1 if transpose_w else 2]
  op = 'dgrad' if transpose_w else 'forward'
  tile = tile or tiles.choose(op, num_rows, k, n, num_experts)
  work = mosaic_rows.plan(num_rows, offsets_E, sizes_E, tile.m)
  y_RN = mosaic_rows.rows_matmul(x_RD, w_EDF, work, tile=tile, transpose_w=transpose_w)
  return layout.match_vma(y_RN, x_RD)[0]


def weight_grad(
  x_RD: jax.Array,
  dy_RF: jax.Array,
  offsets_E: jax.Array,
  sizes_E: jax.Array,
  *,
  dtype: jnp.dtype,
  tile: tiles.Tile | None = None,
) -> jax.Array:
  """As xla.weight_grad. `dtype` is float32 or bfloat16."""
  (num_rows, d), f, num_experts = x_RD.shape, dy_RF.shape[1], sizes_E.shape[0]
  tile = tile or tiles.choose('wgrad', num_rows, d, f, num_experts)
  group_E4 = mosaic_weights.plan(num_rows, offsets_E, sizes_E, tile.k)
  dw_EDF = mosaic_weights.weights_matmul(x_RD, dy_RF, group_E4, tile=tile, dtype=dtype)
  return layout.match_vma(dw_EDF, x_RD)[0]
