"""bfloat16 or float32 to FP8 with scales from the values themselves: stateless, the same bits
on every device.

Rounding is to nearest, ties to even. Nothing here has a gradient: whoever multiplies quantised
operands says what their gradient is.
"""

import jax

from moe_jax.ops.quantize import reference
from moe_jax.ops.quantize.format import TILE, Format, Quantized
from moe_jax.ops.quantize.reference import (
  dequantize_blocks,
  dequantize_rows,
  transpose_blocks,
)

__all__ = [
  'TILE',
  'Format',
  'Quantized',
  'dequantize_blocks',
  'dequantize_rows',
  'quantize_blocks',
  'quantize_columns',
  'quantize_rows',
  'quantize_rows_and_columns',
  'quantize_tensor',
  'transpose_blocks',
]

# R rows  K columns  D, F sides of a matrix

E4M3 = Format()


def quantize_rows(x_RK: jax.Array, fmt: Format = E4M3) -> Quantized:
  """A scale for each 128 values of a row: values [R, K], scale [K/128, R]."""
  _check(x_RK, multiples=(1, TILE))
  return reference.rows(x_RK, fmt)


def quantize_columns(x_RK: jax.Array, fmt: Format = E4M3) -> Quantized:
  """The quantised rows of x transposed: values [K, R], scale [R/128, K]."""
  _check(x_RK, multiples=(TILE, 1))
  return reference.columns(x_RK, fmt)


def quantize_rows_and_columns(x_RK: jax.Array, fmt: Format = E4M3) -> tuple[Quantized, Quantized]:
  """Both of the above from one reading of x."""
  _check(x_RK, multiples=(TILE, TILE))
  return reference.rows(x_RK, fmt), reference.columns(x_RK, fmt)


def quantize_blocks(w_DF: jax.Array, fmt: Format = E4M3) -> Quantized:
  """A scale for each 128 x 128 values of the last two dimensions: scale [..., D/128, F/128]."""
  _check(w_DF, multiples=(TILE, TILE), any_rank=True)
  return reference.blocks(w_DF, fmt)


def quantize_tensor(x: jax.Array, fmt: Format = E4M3) -> Quantized:
  """One scale for all of x."""
  return reference.tensor(x, fmt)


def _check(x: jax.Array, *, multiples: tuple[int, int], any_rank: bool = False) -> None:
  if x.ndim < 2 or (x.ndim > 2 and not any_rank):
    raise ValueError(
      f'quantize: x has shape {x.shape}, must be {"[..., D, F]" * any_rank or "2-D"}.'
    )
  for dim, multiple in zip((-2, -1), multiples, strict=True):
    if x.shape[dim] % multiple:
      raise ValueError(
        f'quantize: dimension {dim} of {x.shape} must be a multiple of {multiple}; pad it.'
      )
