"""Grouped matmul: rows sorted by expert, each multiplied by its expert's matrix.

  y_RF = grouped_matmul(x_RD, w_EDF, sizes_E)

Backends: 'mosaic' (Hopper; bfloat16, and FP8 in fp8.py) and 'xla' (everything). reference.py is the
definition.
"""

# R rows  D in  F out  E experts

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from moe_jax.ops.backends import choose
from moe_jax.ops.grouped_matmul import layout, mosaic_gpu, xla
from moe_jax.ops.grouped_matmul.fp8 import grouped_matmul_fp8, weight_grad_fp8
from moe_jax.ops.grouped_matmul.layout import padded_offsets

__all__ = [
  'grouped_matmul',
  'grouped_matmul_fp8',
  'input_grad',
  'padded_offsets',
  'weight_grad',
  'weight_grad_fp8',
]

_BACKENDS: dict[str, ModuleType] = {'mosaic': mosaic_gpu, 'xla': xla}


def grouped_matmul(
  x_RD: jax.Array,
  w_EDF: jax.Array,
  sizes_E: jax.Array,
  *,
  offsets_E: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """y[r] = x[r] @ w[e] for the rows r of each expert e; zeros in rows of no expert.

  Differentiable in x and w. Rows of no expert get zero gradient and may hold anything, NaN
  included; an expert without rows gets an exactly zero gradient. The same inputs give the same
  bits on every run.

  Args:
    x_RD: rows sorted by expert; its dtype is the dtype of the product's operands and of y.
      Sums are float32.
    w_EDF: in x's dtype, or float32 master weights, which are rounded to x's dtype for the product
      and receive a float32 gradient that never was rounded.
    sizes_E: int32, rows of each expert. May be a traced value; then a sum above R, which
      otherwise raises, is the caller's fault and the rows beyond R are ignored.
    offsets_E: int32, first row of each expert, nondecreasing from 0, when groups have gaps
      between them (`padded_offsets`). Without it rows are compact.
    implementation: 'mosaic' or 'xla', which then runs or raises NotImplementedError with the
      reason. None takes the fastest that can.
  """
  _check(x_RD, w_EDF, sizes_E, offsets_E)
  if offsets_E is None:
    offsets_E = layout.compact_offsets(sizes_E)
  backend = _choose(implementation, x_RD, *w_EDF.shape[1:])
  return _grouped_matmul(backend, *layout.match_vma(x_RD, w_EDF, offsets_E, sizes_E))


def input_grad(
  dy_RF: jax.Array,
  w_EDF: jax.Array,
  sizes_E: jax.Array,
  *,
  offsets_E: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """The gradient of grouped_matmul in its rows, dy[r] @ w[e].T, for who needs it alone."""
  if dy_RF.shape[1] != w_EDF.shape[2]:
    raise ValueError(f'dy {dy_RF.shape} and w {w_EDF.shape} must be [R, F] and [E, D, F].')
  if offsets_E is None:
    offsets_E = layout.compact_offsets(sizes_E)
  backend = _choose(implementation, dy_RF, *w_EDF.shape[1:])
  dy_RF, w_EDF, *groups = layout.match_vma(dy_RF, w_EDF, offsets_E, sizes_E)
  return _BACKENDS[backend].forward(dy_RF, w_EDF.astype(dy_RF.dtype), *groups, transpose_w=True)


def weight_grad(
  x_RD: jax.Array,
  dy_RF: jax.Array,
  sizes_E: jax.Array,
  *,
  offsets_E: jax.Array | None = None,
  dtype: jax.typing.DTypeLike = jnp.float32,
  into: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """The gradient of grouped_matmul in its weights, [E, D, F], rounded once, to `dtype`.

  into: an array [E, D, F] of `dtype` to add the gradient to; the sum is rounded once. Donated or
    made under the same jit, it is updated in place.
  """
  if x_RD.shape[0] != dy_RF.shape[0] or x_RD.dtype != dy_RF.dtype:
    raise ValueError(
      f'x {x_RD.dtype}{x_RD.shape} and dy {dy_RF.dtype}{dy_RF.shape} must agree in rows and dtype.'
    )
  if offsets_E is None:
    offsets_E = layout.compact_offsets(sizes_E)
  shape = (*sizes_E.shape, x_RD.shape[1], dy_RF.shape[1])
  layout.check_into(into, shape, dtype)
  backend = _choose(implementation, x_RD, *shape[1:])
  x_RD, dy_RF, *groups = layout.match_vma(x_RD, dy_RF, offsets_E, sizes_E)
  ops = _BACKENDS[backend]
  return ops.weight_grad(x_RD, dy_RF, *groups, dtype=jnp.dtype(dtype), into_EDF=into)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
  backend: str, x_RD: jax.Array, w_EDF: jax.Array, offsets_E: jax.Array, sizes_E: jax.Array
) -> jax.Array:
  return _BACKENDS[backend].forward(x_RD, w_EDF.astype(x_RD.dtype), offsets_E, sizes_E)


def _forward(backend: str, *args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  # the weights are kept as they came and rounded again: a rounded copy of each layer's experts
  # would live from its forward to its backward pass
  return _grouped_matmul(backend, *args), args


def _backward(
  backend: str, kept: tuple[jax.Array, ...], dy_RF: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
  x_RD, w_EDF, *groups = kept
  ops = _BACKENDS[backend]
  dx_RD = ops.forward(dy_RF, w_EDF.astype(x_RD.dtype), *groups, transpose_w=True)
  return dx_RD, ops.weight_grad(x_RD, dy_RF, *groups, dtype=w_EDF.dtype), None, None


_grouped_matmul.defvjp(_forward, _backward)


def _choose(implementation: str | None, x_RD: jax.Array, d: int, f: int) -> str:
  problem = mosaic_gpu.unsupported(x_RD.dtype, x_RD.shape[0], d, f)
  return choose('grouped_matmul', implementation, problem)


def _check(
  x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, offsets_E: jax.Array | None
) -> None:
  if x_RD.ndim != 2 or w_EDF.ndim != 3 or x_RD.shape[1] != w_EDF.shape[1]:
    raise ValueError(f'x {x_RD.shape} and w {w_EDF.shape} must be [R, D] and [E, D, F].')
  if not jnp.issubdtype(x_RD.dtype, jnp.floating) or w_EDF.dtype not in (x_RD.dtype, jnp.float32):
    raise ValueError(
      f"x is {x_RD.dtype} and w {w_EDF.dtype}: x must be floating and w of x's dtype or float32."
    )
  for name, a in (('sizes', sizes_E), ('offsets', offsets_E)):
    if a is not None and (a.shape != w_EDF.shape[:1] or a.dtype != jnp.int32):
      raise ValueError(f'{name} is {a.dtype}{a.shape}, must be int32[{w_EDF.shape[0]}] as w has.')
  # numpy, because under jit even a constant's sum would be traced
  if not isinstance(sizes_E, Tracer) and (total := np.asarray(sizes_E).sum()) > x_RD.shape[0]:
    raise ValueError(f'sizes sum to {total}, more than the {x_RD.shape[0]} rows of x.')
