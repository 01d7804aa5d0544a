"""Grouped matmul: forward, gradient in x (dgrad), gradient in w (wgrad); FP8 in grouped_fp8.py.

Each shape runs with group sizes recorded in training, with even and with Zipf ones. `dense` is
XLA's plain matmul of as many operations with one matrix: the ceiling. `torch` is torch._grouped_mm
in the same process. Times are of the op as it is called, from sizes to result.
"""

# R rows  D in  F out  E experts

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from experiments.bench.suites import grouped_fp8
from moe_jax.ops.grouped_matmul import grouped_matmul, input_grad, mosaic_gpu, weight_grad
from moe_jax.ops.grouped_matmul.specs import LARGE, SIZES, Spec, even

# TFLOP/s of large dense bfloat16 matmuls under the chip's power limit, not the data sheet's 989
LIMIT = 790.0


class Call(NamedTuple):
  """One row: a function of x, w, dy and sizes, jitted; `check` makes one of its result's error."""

  work: str
  by: str
  fn: Callable
  check: Callable | None = None


def run(only: str = '') -> Iterator[list[table.Row]]:
  yield from grouped_fp8.run(only)
  specs = [spec for spec in shapes() if only in spec.name]
  operands = [functools.partial(data, spec) for spec in specs]
  calls = [calls_of(spec) for spec in specs]
  todo = [(make, ()) for make in operands]
  for make, some in zip(operands, calls, strict=True):
    todo += [(call.fn, jax.eval_shape(make)) for call in some]
  # all at once: most of the time otherwise
  compiled = iter(timing.compile_all(todo))
  operands = [next(compiled) for _ in specs]
  ready = [[(call, next(compiled)) for call in some] for some in calls]
  for label, sizes in SIZES.items() if jax.default_backend() == 'gpu' else [('even', even)]:
    for spec, make, some in zip(specs, operands, ready, strict=True):
      own = dataclasses.replace(spec, sizes=sizes(spec.rows, len(spec.sizes)))
      yield run_case(own, label, make()[:3], some)


def shapes() -> tuple[Spec, ...]:
  if jax.default_backend() != 'gpu':
    return (Spec(name='tiny', rows=512, d=64, f=128, sizes=even(512, 4)),)
  return LARGE


def calls_of(spec: Spec) -> list[Call]:
  on_gpu = jax.default_backend() == 'gpu'
  calls = [Call('fwd', 'dense', dense)] if on_gpu else []
  by, use = 'mosaic' if on_gpu and mosaic_gpu.on_hopper() else 'xla', functools.partial
  calls += [
    Call('fwd', by, use(forward, implementation=by), check_rows),
    Call('dgrad', by, use(dgrad, implementation=by), use(check_rows, transpose_w=True)),
  ]
  return calls + [
    Call(f'wgrad {dtype}', by, use(wgrad, implementation=by, dtype=dtype), check_weights)
    for dtype in ('bfloat16', 'float32')
  ]


def forward(x, w, dy, sizes, *, implementation):
  return grouped_matmul(x, w, sizes, implementation=implementation)


def dgrad(x, w, dy, sizes, *, implementation):
  return input_grad(dy, w, sizes, implementation=implementation)


def wgrad(x, w, dy, sizes, *, implementation, dtype):
  return weight_grad(x, dy, sizes, dtype=dtype, implementation=implementation)


def dense(x, w, dy, sizes):
  return jnp.matmul(x, w[0], preferred_element_type=jnp.bfloat16)


def data(spec: Spec) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """x, w, dy and the sizes, which do not matter to the others."""
  kx, kw, ky = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(kx, (spec.rows, spec.d), jnp.bfloat16)
  w = jax.random.normal(kw, (len(spec.sizes), spec.d, spec.f), jnp.bfloat16) * spec.d**-0.5
  dy = jax.random.normal(ky, (spec.rows, spec.f), jnp.bfloat16)
  return x, w.astype(jnp.bfloat16), dy, jnp.asarray(spec.sizes, jnp.int32)


def run_case(
  spec: Spec, label: str, operands: tuple[jax.Array, ...], calls: list[tuple[Call, Any]]
) -> list[table.Row]:
  args = *operands, jnp.asarray(spec.sizes, jnp.int32)
  shape = f'{spec} R{spec.rows} D{spec.d} F{spec.f} E{len(spec.sizes)}'
  names = dict(shape=shape, sizes=label)
  first = label == next(iter(SIZES)) or jax.default_backend() != 'gpu'
  rows = []
  for call, compiled in calls:
    # sizes change nothing for one matrix
    if call.by == 'dense' and not first:
      continue
    # once a shape: sizes change which rows are whose, not how a row is summed
    error = call.check(spec, *args, compiled(*args)) if call.check and first else None
    measured = timing.measure_jax(compiled, *args, repeats=6)
    rows.append(_row(spec, measured, work=call.work, by=call.by, error=error, **names))
  return rows + (torch_rows(spec, names) if first else [])


def _row(spec: Spec, measured: timing.Timing, **names) -> table.Row:
  return table.row_of(measured, amount=spec.flops, limit=LIMIT, unit='TFLOP/s', **names)


def _error(got: jax.Array, exact: np.ndarray) -> float:
  return float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))


def _largest(spec: Spec) -> tuple[int, int, int]:
  """Expert, first row and end of the largest group."""
  e = int(np.argmax(spec.sizes))
  start = sum(spec.sizes[:e])
  return e, start, start + spec.sizes[e]


def check_rows(
  spec: Spec,
  x: jax.Array,
  w: jax.Array,
  dy: jax.Array,
  sizes: jax.Array,
  y: jax.Array,
  *,
  transpose_w: bool = False,
) -> float:
  """Relative error against float64 over the edges of the largest group, 256 columns."""
  e, start, end = _largest(spec)
  at = np.unique(np.r_[start : min(start + 8, end), max(start, end - 8) : end])
  rows, matrix = (dy, w[e][:256].T) if transpose_w else (x, w[e][:, :256])
  return _error(y[at, :256], np.asarray(rows[at], np.float64) @ np.asarray(matrix, np.float64))


def check_weights(
  spec: Spec, x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array, dw: jax.Array
) -> float:
  """Relative error against float64 over a corner of the largest expert."""
  e, start, end = _largest(spec)
  x_part = np.asarray(x[start:end, :128], np.float64)
  exact = x_part.T @ np.asarray(dy[start:end, -128:], np.float64)
  return _error(dw[e, :128, -128:], exact)


def torch_rows(spec: Spec, names: dict[str, str]) -> list[table.Row]:
  try:
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError:
    return []
  if not torch.cuda.is_available():
    return []
  make = functools.partial(torch.randn, device='cuda', dtype=torch.bfloat16)
  x, dy = make(spec.rows, spec.d), make(spec.rows, spec.f)
  w = make(len(spec.sizes), spec.d, spec.f)
  ends = torch.tensor(np.cumsum(spec.sizes), device='cuda', dtype=torch.int32)
  # the layouts of torch's own MoE layers: weights [E, F, D], used transposed in the forward pass
  w_t = w.transpose(1, 2).contiguous().transpose(1, 2)
  calls = {
    'fwd': lambda: torch._grouped_mm(x, w_t, offs=ends),
    'dgrad': lambda: torch._grouped_mm(dy, w_t.transpose(1, 2), offs=ends),
    'wgrad bfloat16': lambda: torch._grouped_mm(x.t(), dy, offs=ends),
  }
  rows = []
  for work, call in calls.items():
    measured = timing.measure(call, [()], block=lambda _: torch.cuda.synchronize(), repeats=6)
    rows.append(_row(spec, measured, work=work, by='torch', **names))
  del x, dy, w, w_t
  torch.cuda.empty_cache()
  return rows
