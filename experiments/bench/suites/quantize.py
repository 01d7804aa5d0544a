"""bfloat16 to FP8: alone, of gathered rows, and fused with SwiGLU and its gradient.

Useful bytes are inputs once and every result once, scales included. `xla` is the reference as XLA
compiles it; `copy` shows what the memory gives a plain elementwise pass. `error` is the share of
bytes that differ from what the CPU computes, on a corner. The second shape is without XLA.
"""

# R rows  K columns  F width of gate and of up

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from moe_jax.ops import pallas_triton, swiglu
from moe_jax.ops import quantize as qz
from moe_jax.ops.quantize import mosaic

BANDWIDTH = 3000.0  # GB/s
FORMATS = {'': qz.Format(), ' pow2': qz.Format(power_of_two=True)}
# rows, width; the SwiGLU shapes are R, F
SHAPES = {'gpu': ((32768, 7168), (32768, 2048)), 'cpu': ((256, 256),)}
SWIGLU = {'gpu': ((196608, 1408),), 'cpu': ((256, 256),)}


def run(only: str = '') -> Iterator[list[table.Row]]:
  kind = 'gpu' if jax.default_backend() == 'gpu' else 'cpu'
  for shape in SHAPES[kind]:
    if only in f'plain {shape}':
      yield run_plain(*shape)
  for shape in SWIGLU[kind]:
    if only in f'swiglu {shape}':
      yield run_swiglu(*shape)


def _backends() -> tuple[str, ...]:
  problems = {'mosaic': mosaic.unsupported(jnp.bfloat16), 'triton': pallas_triton.unavailable()}
  return *(name for name, problem in problems.items() if problem is None), 'xla'


def _bytes(tree: Any) -> int:
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _add(rows: list, work: str, by: str, shape: str, fn: Callable, *args: Any, **more) -> Any:
  moved = _bytes(args) + _bytes(jax.eval_shape(fn, *args))
  # all inputs and results of two programs are in memory at a time
  measured = timing.measure_together(fn, *args, calls=max(2, min(6, int(12e9 / moved))))
  names = dict(work=work, by=by, shape=shape, sizes='', **more)
  rows.append(table.row_of(measured, amount=moved, unit='GB/s', limit=BANDWIDTH, **names))


def differing(fn: Callable, x: jax.Array) -> float:
  """Share of differing bytes between this device and the CPU on the same corner of x."""
  corner = np.asarray(x[:256, :256])
  found = jax.tree.leaves(jax.jit(fn)(jnp.asarray(corner)))
  with jax.default_device(jax.devices('cpu')[0]):
    exact = jax.jit(lambda x: qz.quantize_rows_and_columns(x, implementation='xla'))(corner)
  pairs = zip(found, jax.tree.leaves(exact), strict=True)
  raw = lambda a: np.asarray(a).view(np.uint8)
  return float(max((raw(a) != raw(b)).mean() for a, b in pairs))


def run_plain(num_rows: int, k: int) -> list[table.Row]:
  key, shape = jax.random.key(0), f'R{num_rows} K{k}'
  x = jax.random.normal(key, (num_rows, k), jnp.bfloat16)
  token = jax.random.permutation(key, num_rows).astype(jnp.int32)
  w = jax.random.normal(key, (8, 2048, k), jnp.float32)
  rows: list[table.Row] = []
  _add(rows, 'copy', 'xla', shape, lambda x: x + 1, x)
  for by in _backends():
    if by == 'xla' and (num_rows, k) in SHAPES['gpu'][1:]:
      continue
    for label, fmt in FORMATS.items():
      both = functools.partial(qz.quantize_rows_and_columns, fmt=fmt, implementation=by)
      error = differing(both, x) if not label else None
      _add(rows, f'rows and columns{label}', by, shape, both, x, error=error)
    use = lambda fn, by=by: functools.partial(fn, implementation=by)
    blocks = use(qz.quantize_blocks_and_transposed)
    _add(rows, 'float32 blocks, both ways', by, f'E8 D2048 F{k}', blocks, w)
    if by == 'mosaic':
      continue
    _add(rows, 'rows', by, shape, use(qz.quantize_rows), x)
    _add(rows, 'columns', by, shape, use(qz.quantize_columns), x)
    gathered = lambda x, t, by=by: qz.quantize_columns(x, token_R=t, implementation=by)
    _add(rows, 'columns of gathered rows', by, shape, gathered, x, token)
  return rows


def run_swiglu(num_rows: int, f: int) -> list[table.Row]:
  keys, shape = jax.random.split(jax.random.key(0), 3), f'R{num_rows} F{f}'
  da = jax.random.normal(keys[0], (num_rows, f), jnp.bfloat16)
  h = jax.random.normal(keys[1], (num_rows, 2 * f), jnp.bfloat16)
  weight, fmt = jax.random.uniform(keys[2], (num_rows,)), qz.Format()
  kept = jax.jit(lambda h: qz.quantize_rows(h, fmt))(h)
  rows: list[table.Row] = []
  _add(rows, 'swiglu', 'xla', shape, swiglu.swiglu_forward, h)
  for by in _backends():
    use = lambda fn, by=by, **more: functools.partial(fn, implementation=by, **more)
    backward = use(swiglu.swiglu_backward_quantized, fmts=(fmt,) * 3)
    _add(rows, 'gradient to rows and columns', by, shape, backward, da, h, weight)
    _add(rows, 'the same, of h in FP8', by, shape, backward, da, kept, weight)
    if by == 'mosaic':
      continue
    _add(rows, 'swiglu to rows', by, shape, use(swiglu.swiglu_rows, fmt=fmt), h)
    _add(rows, 'swiglu and h to rows', by, shape, use(swiglu.swiglu_rows_and_hidden, fmt=fmt), h)
    if by == 'triton':
      # a call of its own must copy da and h first, as their memory becomes the results'
      after = lambda da, h, w: (*swiglu.swiglu_backward(da, h, w), da, h)
      _add(rows, 'gradient in bfloat16, copies', by, shape, after, da, h, weight)
    else:
      _add(rows, 'gradient in bfloat16', by, shape, use(swiglu.swiglu_backward), da, h, weight)
  return rows
