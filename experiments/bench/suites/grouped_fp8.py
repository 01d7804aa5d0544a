"""Grouped matmul in FP8 with 1x128 and 128x128 scales, the rows of suite grouped_matmul for it.

Operands are quantised before the clock starts, but for the row `linear`: forward, both gradients
and every quantisation of one expert layer from its bfloat16 x, w and dy. `torch` is
torch._scaled_grouped_mm with one scale a row. Errors are those of float32 results against float64.
"""

# R rows  D in  F out  E experts

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from moe_jax.ops.grouped_matmul import grouped_matmul_fp8, mosaic_gpu, weight_grad_fp8
from moe_jax.ops.grouped_matmul.specs import LARGE_FP8, Spec, even
from moe_jax.ops.quantize import (
  Quantized,
  quantize_blocks,
  quantize_rows_and_columns,
  transpose_blocks,
)

# TFLOP/s of large dense FP8 matmuls under the chip's power limit
LIMIT = 1430.0


def run(only: str) -> Iterator[list[table.Row]]:
  if jax.default_backend() != 'gpu':
    tiny = Spec(name='fp8_tiny', rows=512, d=128, f=256, sizes=even(512, 4))
    if only in tiny.name:
      yield run_case(tiny)
  elif mosaic_gpu.on_hopper():
    for spec in LARGE_FP8:
      if only in spec.name:
        yield run_case(spec)


@functools.partial(jax.jit, static_argnums=0)
def data(spec: Spec) -> tuple[jax.Array, jax.Array, jax.Array]:
  kx, kw, ky = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(kx, (spec.rows, spec.d), jnp.bfloat16)
  w = jax.random.normal(kw, (len(spec.sizes), spec.d, spec.f), jnp.bfloat16)
  return x, w, jax.random.normal(ky, (spec.rows, spec.f), jnp.bfloat16)


@functools.partial(jax.jit, static_argnames='dtype')
def rows(x: Quantized, w: Quantized, sizes: jax.Array, dtype: str = 'bfloat16') -> jax.Array:
  return grouped_matmul_fp8(x, w, sizes, dtype=dtype)


@functools.partial(jax.jit, static_argnames='dtype')
def weights(x: Quantized, dy: Quantized, sizes: jax.Array, dtype: str) -> jax.Array:
  return weight_grad_fp8(x, dy, sizes, dtype=dtype)


@jax.jit
def linear(
  x_RD: jax.Array, w_EDF: jax.Array, dy_RF: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  (x, x_t), (dy, dy_t) = quantize_rows_and_columns(x_RD), quantize_rows_and_columns(dy_RF)
  w = quantize_blocks(w_EDF)
  return (
    grouped_matmul_fp8(x, transpose_blocks(w), sizes),
    grouped_matmul_fp8(dy, w, sizes),
    weight_grad_fp8(x_t, dy_t, sizes, dtype=jnp.bfloat16),
  )


def run_case(spec: Spec) -> list[table.Row]:
  x_RD, w_EDF, dy_RF = data(spec)
  sizes = jnp.asarray(spec.sizes, jnp.int32)
  by = 'mosaic' if jax.default_backend() == 'gpu' else 'xla'
  names = dict(
    shape=f'{spec} R{spec.rows} D{spec.d} F{spec.f} E{len(spec.sizes)}', sizes='even x 128'
  )
  found = []

  def add(work: str, by: str, fn: Callable, *args: Any, error=None, times: int = 1):
    found.append(
      table.row_of(
        timing.measure_jax(fn, *args),
        amount=times * spec.flops,
        limit=LIMIT,
        unit='TFLOP/s',
        work=work,
        by=by,
        error=error,
        **names,
      )
    )

  # float32 results are only made to look at their error, and only once: each is a compilation
  whole = spec.name in ('fp8_linear', 'fp8_tiny')
  (x, x_t), (dy, dy_t) = quantize_rows_and_columns(x_RD), quantize_rows_and_columns(dy_RF)
  w = quantize_blocks(w_EDF)
  if spec.name != 'fp8_deepgemm_wgrad':
    w_t = transpose_blocks(w)
    error = rows_error(x, w_t, rows(x, w_t, sizes, 'float32')) if whole else None
    add('fp8 fwd', by, rows, x, w_t, sizes, error=error)
  if whole or spec.name == 'fp8_deepgemm_wgrad':
    add('fp8 wgrad bfloat16', by, functools.partial(weights, dtype='bfloat16'), x_t, dy_t, sizes)
  if whole:
    error = weights_error(spec, x_t, dy_t, weights(x_t, dy_t, sizes, 'float32'))
    fn = functools.partial(weights, dtype='float32')
    add('fp8 wgrad float32', by, fn, x_t, dy_t, sizes, error=error)
    add('fp8 dgrad', by, rows, dy, w, sizes)
    add('fp8 linear, with quantisation', by, linear, x_RD, w_EDF, dy_RF, sizes, times=3)
  return found + torch_rows(spec, names)


def _exact(values: Any, scale: Any) -> np.ndarray:
  """float64 numbers of quantised rows; a scale for each 128 columns."""
  return np.asarray(values, np.float64) * np.repeat(np.asarray(scale, np.float64), 128, axis=1)


def _error(got: jax.Array, exact: np.ndarray) -> float:
  return float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))


def rows_error(x: Quantized, w: Quantized, y: jax.Array) -> float:
  """Of the last rows, 128 columns of them; all of them are the last expert's."""
  x_part = _exact(x.values[-8:], x.scale[:, -8:].T)
  w_part = _exact(w.values[-1, :128], w.scale[-1, :1])
  return _error(y[-8:, :128], x_part @ w_part.T)


def weights_error(spec: Spec, x: Quantized, dy: Quantized, dw: jax.Array) -> float:
  """Of a corner of the last expert."""
  own, blocks = spec.sizes[-1], spec.sizes[-1] // 128
  x_part = _exact(x.values[:8, -own:], x.scale[-blocks:, :8].T)
  dy_part = _exact(dy.values[:128, -own:], dy.scale[-blocks:, :128].T)
  return _error(dw[-1, :8, :128], x_part @ dy_part.T)


def torch_rows(spec: Spec, names: dict[str, str]) -> list[table.Row]:
  try:
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError:
    return []
  if not torch.cuda.is_available() or spec.name == 'fp8_deepgemm_wgrad':
    return []
  make = lambda *shape: torch.randn(*shape, device='cuda').to(torch.float8_e4m3fn)
  experts = len(spec.sizes)
  x, w = make(spec.rows, spec.d), make(experts, spec.f, spec.d).transpose(1, 2)
  x_scale = torch.ones(spec.rows, device='cuda')
  w_scale = torch.ones(experts, spec.f, device='cuda')
  ends = torch.tensor(np.cumsum(spec.sizes), device='cuda', dtype=torch.int32)
  call = lambda: torch._scaled_grouped_mm(
    x, w, x_scale, w_scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
  )
  measured = timing.measure(call, [()], block=lambda _: torch.cuda.synchronize())
  row = table.row_of(
    measured, amount=spec.flops, limit=LIMIT, unit='TFLOP/s', work='fp8 fwd', by='torch', **names
  )
  del x, w
  torch.cuda.empty_cache()
  return [row]
