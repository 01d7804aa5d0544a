"""SwiGLU on gate and up side by side, its gradient in one pass, and both to FP8.

None of these has a gradient of its own but `swiglu`: ops/experts puts them together.
"""

from types import ModuleType
from typing import Any

import jax

from moe_jax.ops import backends, pallas_triton
from moe_jax.ops.quantize import (
  TILE,
  Format,
  Quantized,
  dequantize_rows,
  quantize_columns,
  quantize_rows,
  quantize_rows_and_columns,
)
from moe_jax.ops.swiglu import mosaic, reference, triton
from moe_jax.ops.swiglu.reference import swiglu

__all__ = [
  'swiglu',
  'swiglu_backward',
  'swiglu_backward_quantized',
  'swiglu_forward',
  'swiglu_rows',
  'swiglu_rows_and_hidden',
]

# R rows  F width of gate and of up

_BACKENDS: dict[str, ModuleType] = {'triton': triton, 'xla': reference}


@jax.named_scope('swiglu')
def swiglu_forward(h_R2F: jax.Array, *, limit: float = 0.0) -> jax.Array:
  """swiglu of the two halves: [R, F]. XLA makes one pass of it on every device."""
  return reference.forward(h_R2F, limit=limit)


@jax.named_scope('swiglu')
def swiglu_backward(
  da_RF: jax.Array,
  h_R2F: jax.Array | Quantized,
  weight_R: jax.Array,
  *,
  limit: float = 0.0,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of weight * f(swiglu(h)), given da = the gradient of f alone.

  Returns the gradient in h, [R, 2F]; weight * swiglu(h), [R, F], the left operand of the gradient
  in f's matrix; and the gradient in the weight, float32 [R].

  Args:
    h_R2F: as it was, or quantised by rows; its gradient then has da's dtype.
  """
  name = pallas_triton.choose('swiglu_backward', implementation, pallas_triton.unavailable())
  if name == 'xla' and isinstance(h_R2F, Quantized):
    dh_R2F, a_RF, dweight_R = reference.backward(
      da_RF, dequantize_rows(h_R2F), weight_R, limit=limit
    )
    return dh_R2F.astype(da_RF.dtype), a_RF, dweight_R
  return _BACKENDS[name].backward(da_RF, h_R2F, weight_R, limit=limit)


@jax.named_scope('swiglu')
def swiglu_rows(
  h_R2F: jax.Array, fmt: Format, *, limit: float = 0.0, implementation: str | None = None
) -> Quantized:
  """swiglu of the two halves, quantised by rows without having been rounded before."""
  return _rows(h_R2F, fmt, limit, implementation, keep=False)[0]


@jax.named_scope('swiglu')
def swiglu_rows_and_hidden(
  h_R2F: jax.Array, fmt: Format, *, limit: float = 0.0, implementation: str | None = None
) -> tuple[Quantized, Quantized]:
  """`swiglu_rows`, and h itself quantised by rows, from one reading of h."""
  a, h = _rows(h_R2F, fmt, limit, implementation, keep=True)
  return a, h


def _rows(
  h_R2F: jax.Array, fmt: Format, limit: float, implementation: str | None, *, keep: bool
) -> tuple[Quantized, ...]:
  f = h_R2F.shape[1] // 2
  _check(f)
  if pallas_triton.choose('swiglu_rows', implementation, pallas_triton.unavailable()) == 'triton':
    return triton.forward_rows(h_R2F, fmt, limit=limit, keep=keep)
  xla: Any = dict(implementation='xla')
  a = quantize_rows(swiglu(*reference.halves(h_R2F), limit=limit), fmt, **xla)
  return (a, quantize_rows(h_R2F, fmt, **xla)) if keep else (a,)


@jax.named_scope('swiglu')
def swiglu_backward_quantized(
  da_RF: jax.Array,
  h_R2F: jax.Array | Quantized,
  weight_R: jax.Array,
  fmts: tuple[Format, Format, Format],
  *,
  limit: float = 0.0,
  implementation: str | None = None,
) -> tuple[Quantized, Quantized, Quantized, jax.Array]:
  """As `swiglu_backward`: rows and columns of the gradient in h, columns of weight * swiglu(h).

  Args:
    implementation: 'mosaic', all in one pass; 'triton', by kernels one after another; or 'xla'.
  """
  _check(da_RF.shape[1])
  if da_RF.shape[0] % TILE:
    raise ValueError(f'swiglu: {da_RF.shape[0]} rows must be a multiple of {TILE}; pad them.')
  problems = {'mosaic': mosaic.unsupported(da_RF, h_R2F), 'triton': pallas_triton.unavailable()}
  name = backends.first('swiglu_backward_quantized', implementation, problems)
  if name == 'mosaic':
    return mosaic.backward_quantized(da_RF, h_R2F, weight_R, fmts, limit=limit)
  by: Any = dict(implementation=name)
  dh_R2F, a_RF, dweight_R = swiglu_backward(da_RF, h_R2F, weight_R, limit=limit, **by)
  a_t = quantize_columns(a_RF, fmts[2], **by)
  if fmts[0] == fmts[1]:
    return *quantize_rows_and_columns(dh_R2F, fmts[0], **by), a_t, dweight_R
  dh, dh_t = quantize_rows(dh_R2F, fmts[0], **by), quantize_columns(dh_R2F, fmts[1], **by)
  return dh, dh_t, a_t, dweight_R


def _check(f: int) -> None:
  if f % TILE:
    raise ValueError(f'swiglu: a width of {f} must be a multiple of {TILE} to be quantised.')
