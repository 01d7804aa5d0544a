"""Hopper backend: which shapes it takes, which tiles it uses. The kernels are in mosaic_*.py.

Each is a jitted function of its own, so that call sites of one shape share one kernel: to lower one
takes Python most of a second, and a training step in FP8 has sixty sites.
"""

# R rows  D in  F out  E experts  K contracted  N columns of the result  B blocks of 128

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.ops.backends import on_hopper
from moe_jax.ops.grouped_matmul import (
  layout,
  mosaic_rows,
  mosaic_rows_fp8,
  mosaic_weights,
  mosaic_weights_fp8,
  tiles,
)


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


def gathers(dtype: jnp.dtype, num_rows: int, d: int, f: int) -> bool:
  """Whether the kernels below take token_R: then whole tiles must lie within d and f columns."""
  return unsupported(dtype, num_rows, d, f) is None and d % 256 == 0 and f % 128 == 0


@functools.partial(jax.jit, static_argnames=('transpose_w', 'tile'))
def forward(
  x_RD: jax.Array,
  w_EDF: jax.Array,
  offsets_E: jax.Array,
  sizes_E: jax.Array,
  *,
  transpose_w: bool = False,
  tile: tiles.Tile | None = None,
  token_R: jax.Array | None = None,
) -> jax.Array:
  """As xla.forward: x[r] @ w[e], or x[r] @ w[e].T with `transpose_w`; of x[token_R] if given."""
  k, num_experts = x_RD.shape[1], w_EDF.shape[0]
  num_rows = (x_RD if token_R is None else token_R).shape[0]
  n = w_EDF.shape[1 if transpose_w else 2]
  op = 'dgrad' if transpose_w else 'forward'
  tile = tile or tiles.choose(op, num_rows, k, n, num_experts)
  if token_R is not None:
    tile = dataclasses.replace(tile, pair=1)
  work = mosaic_rows.plan(num_rows, offsets_E, sizes_E, tile.m)
  y_RN = mosaic_rows.rows_matmul(
    x_RD, w_EDF, work, tile=tile, transpose_w=transpose_w, token_R=token_R
  )
  return layout.match_vma(y_RN, x_RD)[0]


@functools.partial(jax.jit, static_argnames=('dtype', 'tile', 'gathers'))
def weight_grad(
  x_RD: jax.Array,
  dy_RF: jax.Array,
  offsets_E: jax.Array,
  sizes_E: jax.Array,
  *,
  dtype: jnp.dtype,
  into_EDF: jax.Array | None = None,
  tile: tiles.Tile | None = None,
  token_R: jax.Array | None = None,
  gathers: str = '',
) -> jax.Array:
  """As xla.weight_grad. `dtype` is float32 or bfloat16; token_R names the rows of `gathers`."""
  d, f, num_experts = x_RD.shape[1], dy_RF.shape[1], sizes_E.shape[0]
  num_rows = (dy_RF if gathers == 'x' else x_RD).shape[0]
  tile = tile or tiles.choose('wgrad', num_rows, d, f, num_experts)
  if token_R is not None:
    tile = dataclasses.replace(tile, pair=1)
  group_E4 = mosaic_weights.plan(num_rows, offsets_E, sizes_E, tile.k)
  dw_EDF = mosaic_weights.weights_matmul(
    x_RD,
    dy_RF,
    group_E4,
    tile=tile,
    dtype=dtype,
    into_EDF=into_EDF,
    token_R=token_R,
    gathers=gathers,
  )
  return layout.match_vma(dw_EDF, x_RD)[0]


def unsupported_fp8(a: jnp.dtype, b: jnp.dtype) -> str | None:
  """As `unsupported`, of two quantised operands; fp8.py has checked their shapes."""
  if not on_hopper():
    return f'needs a Hopper GPU (compute capability 9.0), this is {jax.devices()[0].device_kind}'
  if a != jnp.float8_e4m3fn or b != jnp.float8_e4m3fn:
    return f'needs float8_e4m3fn operands, got {a} and {b}'
  return None


@functools.partial(jax.jit, static_argnames=('dtype', 'tile'))
def forward_fp8(
  x_RK: jax.Array,
  x_scale_BR: jax.Array,
  w_ENK: jax.Array,
  w_scale_ENB: jax.Array,
  offsets_E: jax.Array,
  sizes_E: jax.Array,
  *,
  dtype: jnp.dtype,
  tile: tiles.Tile | None = None,
) -> jax.Array:
  """x[r] @ w[e].T of quantised operands."""
  (num_rows, k), (num_experts, n) = x_RK.shape, w_ENK.shape[:2]
  tile = tile or tiles.choose('forward_fp8', num_rows, k, n, num_experts)
  work = mosaic_rows.plan(num_rows, offsets_E, sizes_E, tile.m)
  y_RN = mosaic_rows_fp8.rows_matmul(
    x_RK, x_scale_BR, w_ENK, w_scale_ENB, work, tile=tile, dtype=dtype
  )
  return layout.match_vma(y_RN, x_RK)[0]


@functools.partial(jax.jit, static_argnames=('dtype', 'tile'))
def weight_grad_fp8(
  x_DR: jax.Array,
  x_scale_BD: jax.Array,
  dy_FR: jax.Array,
  dy_scale_BF: jax.Array,
  offsets_E: jax.Array,
  sizes_E: jax.Array,
  *,
  dtype: jnp.dtype,
  into_EDF: jax.Array | None = None,
  tile: tiles.Tile | None = None,
) -> jax.Array:
  """x[:, rows of e] @ dy[:, rows of e].T of quantised operands, for every expert e."""
  (d, num_rows), f, num_experts = x_DR.shape, dy_FR.shape[0], sizes_E.shape[0]
  tile = tile or tiles.choose('wgrad_fp8', num_rows, d, f, num_experts)
  group_E2 = mosaic_weights_fp8.plan(num_rows, offsets_E, sizes_E)
  dw_EDF = mosaic_weights_fp8.weights_matmul(
    x_DR, x_scale_BD, dy_FR, dy_scale_BF, group_E2, tile=tile, dtype=dtype, into_EDF=into_EDF
  )
  return layout.match_vma(dw_EDF, x_DR)[0]
