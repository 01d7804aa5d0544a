"""Grouped matmul of operands that are quantised already: FP8 products, float32 sums.

  y_RN = grouped_matmul_fp8(x, w, sizes_E)             forward, and the gradient in the rows
  dw_EDF = weight_grad_fp8(x, dy, sizes_E)             the gradient in the weights

FP8 tensor cores contract along what lies contiguous in memory, so each product has operands of its
own (`ops/quantize` makes them): with w_EDF the parameters,

  forward        rows of x [R, D]                 blocks of the transposed weights [E, F, D]
  dx             rows of dy [R, F]                blocks of the weights [E, D, F]
  dw             columns of x [D, R]              columns of dy [F, R]

Groups start on multiples of 128 rows, so that 128 rows with one scale have one owner. Who quantises
defines the gradient, so there is none here.
"""

# R rows  K contracted  N columns of the result  D in  F out  E experts

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from moe_jax.ops.backends import choose
from moe_jax.ops.grouped_matmul import layout, mosaic_gpu, xla
from moe_jax.ops.quantize import TILE, Quantized, dequantize_blocks, dequantize_rows


def grouped_matmul_fp8(
  x: Quantized,
  w: Quantized,
  sizes_E: jax.Array,
  *,
  offsets_E: jax.Array | None = None,
  dtype: jax.typing.DTypeLike = jnp.bfloat16,
  implementation: str | None = None,
) -> jax.Array:
  """y[r] = x[r] @ w[e].T for the rows r of each expert e; zeros in rows of no expert.

  Args:
    x: quantised rows, [R, K] with scale [K/128, R]. Rows of no expert may hold anything.
    w: quantised blocks, [E, N, K] with scale [E, N/128, K/128].
    sizes_E: int32, rows of each expert, as in `grouped_matmul`.
    offsets_E: int32, first row of each expert, multiples of 128; without it
      `padded_offsets(sizes, 128)`.
    dtype: of y, which is rounded once.
    implementation: 'mosaic', 'xla' or None, as in `grouped_matmul`.

  On Hopper the tensor cores keep about 14 bits of a sum of 128 products (DeepSeek-V3, section
  3.3.2), 1.3e-4 of its norm, before it is added in float32.
  """
  if x.values.ndim != 2 or w.values.ndim != 3 or x.values.shape[1] != w.values.shape[2]:
    raise ValueError(f'x {x.values.shape} and w {w.values.shape} must be [R, K] and [E, N, K].')
  (num_rows, k), (num_experts, n) = x.values.shape, w.values.shape[:2]
  _check_scale('x', x, (num_rows, k), (k // TILE, num_rows))
  _check_scale('w', w, (num_experts, n, k), (num_experts, n // TILE, k // TILE))
  offsets_E = _check_groups(num_rows, num_experts, sizes_E, offsets_E)
  args = layout.match_vma(*x, *w, offsets_E, sizes_E)
  problem = mosaic_gpu.unsupported_fp8(x.values.dtype, w.values.dtype)
  if choose('grouped_matmul', implementation, problem) == 'xla':
    x, w = Quantized(*args[:2]), Quantized(*args[2:4])
    y = xla.forward(dequantize_rows(x), dequantize_blocks(w), *args[4:], transpose_w=True)
    return y.astype(dtype)
  return mosaic_gpu.forward_fp8(*args, dtype=jnp.dtype(dtype))


def weight_grad_fp8(
  x: Quantized,
  dy: Quantized,
  sizes_E: jax.Array,
  *,
  offsets_E: jax.Array | None = None,
  dtype: jax.typing.DTypeLike = jnp.float32,
  into: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """dw[e] = x[rows of e].T @ dy[rows of e], [E, D, F]; exact zeros for an expert without rows.

  Args:
    x: quantised columns, [D, R] with scale [R/128, D]. Rows of no expert must be zeros in x or dy,
      and finite in both.
    dy: quantised columns, [F, R] with scale [R/128, F].
    dtype: of dw, which is rounded once.
    into: an array like dw to add it to, as in `weight_grad`.
    sizes_E, offsets_E, implementation: as in `grouped_matmul_fp8`.
  """
  if x.values.ndim != 2 or dy.values.ndim != 2 or x.values.shape[1] != dy.values.shape[1]:
    raise ValueError(f'x {x.values.shape} and dy {dy.values.shape} must be [D, R] and [F, R].')
  (d, num_rows), f = x.values.shape, dy.values.shape[0]
  _check_scale('x', x, (d, num_rows), (num_rows // TILE, d))
  _check_scale('dy', dy, (f, num_rows), (num_rows // TILE, f))
  offsets_E = _check_groups(num_rows, sizes_E.shape[0], sizes_E, offsets_E)
  layout.check_into(into, (*sizes_E.shape, d, f), dtype)
  args = layout.match_vma(*x, *dy, offsets_E, sizes_E)
  problem = mosaic_gpu.unsupported_fp8(x.values.dtype, dy.values.dtype)
  if choose('grouped_matmul', implementation, problem) == 'xla':
    x_RD, dy_RF = (dequantize_rows(Quantized(*q)).T for q in (args[:2], args[2:4]))
    return xla.weight_grad(x_RD, dy_RF, *args[4:], dtype=jnp.dtype(dtype), into_EDF=into)
  return mosaic_gpu.weight_grad_fp8(*args, dtype=jnp.dtype(dtype), into_EDF=into)


def _check_scale(name: str, q: Quantized, shape: tuple, scale_shape: tuple) -> None:
  if any(n % TILE for n in shape[-2:]):
    raise ValueError(
      f'{name} is {q.values.shape}: rows and widths must be multiples of {TILE}, pad them.'
    )
  if q.scale.shape != scale_shape or q.scale.dtype != jnp.float32:
    raise ValueError(
      f'{name} {q.values.shape} has a scale {q.scale.dtype}{q.scale.shape}, which must be '
      f'float32{scale_shape}.'
    )


def _check_groups(
  num_rows: int, num_experts: int, sizes_E: jax.Array, offsets_E: jax.Array | None
) -> jax.Array:
  """The offsets, after a look at those that are not traced."""
  padded_E = layout.padded_offsets(sizes_E, TILE) if offsets_E is None else offsets_E
  for name, a in (('sizes', sizes_E), ('offsets', padded_E)):
    if a.shape != (num_experts,) or a.dtype != jnp.int32:
      raise ValueError(f'{name} is {a.dtype}{a.shape}, must be int32[{num_experts}].')
  if not isinstance(sizes_E, Tracer) and not isinstance(padded_E, Tracer) and num_experts:
    starts, sizes = np.asarray(padded_E), np.asarray(sizes_E)
    if (starts % TILE).any():
      raise ValueError(f'offsets {starts.tolist()} must be multiples of {TILE}: padded_offsets.')
    if (end := int((starts + sizes).max())) > num_rows:
      raise ValueError(f'groups end at row {end}, after the {num_rows} rows there are.')
  return padded_E
