"""bfloat16 or float32 to FP8 with scales from the values themselves: stateless, the same bits
on every device.

Rounding is to nearest, ties to even. Nothing here has a gradient: whoever multiplies quantised
operands says what their gradient is.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.ops import backends, pallas_triton
from moe_jax.ops.quantize import mosaic, reference, triton
from moe_jax.ops.quantize.format import TILE, Format, Quantized
from moe_jax.ops.quantize.reference import (
  dequantize_blocks,
  dequantize_rows,
  through,
  transpose_blocks,
)

__all__ = [
  'TILE',
  'Format',
  'Quantized',
  'dequantize_blocks',
  'dequantize_rows',
  'quantize_blocks',
  'quantize_blocks_and_transposed',
  'quantize_blocks_transposed',
  'quantize_columns',
  'quantize_rows',
  'quantize_rows_and_columns',
  'quantize_tensor',
  'through',
  'transpose_blocks',
]

# R rows  K columns  D, F sides of a matrix

E4M3 = Format()


def quantize_rows(
  x_RK: jax.Array, fmt: Format = E4M3, *, implementation: str | None = None
) -> Quantized:
  """A scale for each 128 values of a row: values [R, K], scale [K/128, R]."""
  return _tiles(x_RK, fmt, None, implementation, by_row=True)[0]


def quantize_columns(
  x_RK: jax.Array,
  fmt: Format = E4M3,
  *,
  token_R: jax.Array | None = None,
  implementation: str | None = None,
) -> Quantized:
  """The quantised rows of x transposed: values [K, R], scale [R/128, K].

  With token_R the columns are those of x[token_R], which is never in memory; a token past the end
  of x makes a row of zeros.
  """
  return _tiles(x_RK, fmt, token_R, implementation, by_column=True)[0]


def quantize_rows_and_columns(
  x_RK: jax.Array,
  fmt: Format = E4M3,
  *,
  token_R: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[Quantized, Quantized]:
  """Both of the above from one reading of x."""
  row, column = _tiles(x_RK, fmt, token_R, implementation, by_row=True, by_column=True)
  return row, column


def quantize_blocks(
  w_DF: jax.Array, fmt: Format = E4M3, *, implementation: str | None = None
) -> Quantized:
  """A scale for each 128 x 128 values of the last two dimensions: scale [..., D/128, F/128]."""
  return _blocks(w_DF, fmt, ('plain',), implementation)[0]


def quantize_blocks_transposed(
  w_DF: jax.Array, fmt: Format = E4M3, *, implementation: str | None = None
) -> Quantized:
  """`transpose_blocks` of the above, [..., F, D], without making the above."""
  return _blocks(w_DF, fmt, ('transposed',), implementation)[0]


def quantize_blocks_and_transposed(
  w_DF: jax.Array,
  fmt: Format = E4M3,
  *,
  via: jax.typing.DTypeLike | None = None,
  implementation: str | None = None,
) -> tuple[Quantized, Quantized]:
  """Both of the above from one reading of w, which is rounded to `via` first."""
  plain, transposed = _blocks(w_DF, fmt, ('plain', 'transposed'), implementation, via)
  return plain, transposed


def quantize_tensor(x: jax.Array, fmt: Format = E4M3) -> Quantized:
  """One scale for all of x. XLA needs two passes, and so would anyone."""
  return reference.tensor(x, fmt)


@jax.named_scope('quantize')
def _tiles(
  x_RK: jax.Array,
  fmt: Format,
  token_R: jax.Array | None,
  implementation: str | None,
  *,
  by_row: bool = False,
  by_column: bool = False,
) -> tuple[Quantized, ...]:
  if x_RK.ndim != 2:
    raise ValueError(f'quantize: x has shape {x_RK.shape}, must be [R, K].')
  num_rows = x_RK.shape[0] if token_R is None else token_R.shape[0]
  problem = pallas_triton.unavailable()
  if by_row:
    _check('width', x_RK.shape[1])
  if by_column:
    _check('number of rows', num_rows)
    if x_RK.shape[1] % TILE and not problem:
      problem = f'needs a width that is a multiple of {TILE}, got {x_RK.shape[1]}'
  problems = {'triton': problem}
  if by_row and by_column and token_R is None:
    problems = {'mosaic': mosaic.unsupported(x_RK.dtype)} | problems
  match backends.first('quantize', implementation, problems):
    case 'mosaic':
      return mosaic.rows_and_columns(x_RK, fmt)
    case 'triton':
      by: Any = dict(by_row=by_row, by_column=by_column)
      return triton.quantize(x_RK, fmt, token_R=token_R, **by)
  if token_R is not None:
    x_RK = x_RK.at[token_R].get(mode='fill', fill_value=0)
  rows = (reference.rows(x_RK, fmt),) if by_row else ()
  return rows + ((reference.columns(x_RK, fmt),) if by_column else ())


@jax.named_scope('quantize')
def _blocks(
  w_DF: jax.Array,
  fmt: Format,
  want: tuple[str, ...],
  implementation: str | None,
  via: jax.typing.DTypeLike | None = None,
) -> tuple[Quantized, ...]:
  if w_DF.ndim < 2:
    raise ValueError(f'quantize: w has shape {w_DF.shape}, must be [..., D, F].')
  _check('height', w_DF.shape[-2])
  _check('width', w_DF.shape[-1])
  problems = {'triton': pallas_triton.unavailable()}
  if len(want) > 1:
    problems = {'mosaic': mosaic.unsupported(w_DF.dtype, jnp.float32)} | problems
  name = backends.first('quantize', implementation, problems)
  if name != 'xla':
    w_EDF = w_DF.reshape(-1, *w_DF.shape[-2:])
    if name == 'mosaic':
      found = mosaic.blocks(w_EDF, fmt, via=via)
    else:
      found = triton.blocks(w_EDF, fmt, want=want, via=via)
    lead = w_DF.shape[:-2]
    return tuple(Quantized(*(a.reshape(*lead, *a.shape[1:]) for a in q)) for q in found)
  plain = reference.blocks(reference.through(w_DF, via), fmt)
  return tuple(plain if name == 'plain' else transpose_blocks(plain) for name in want)


def _check(what: str, size: int) -> None:
  if size % TILE:
    raise ValueError(f'quantize: a {what} of {size} must be a multiple of {TILE}; pad it.')
