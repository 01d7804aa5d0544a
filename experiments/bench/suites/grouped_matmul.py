"""Grouped matmul: forward, gradient in x (dgrad), gradient in w (wgrad); FP8 in grouped_fp8.py.

Each shape runs with uneven group sizes, as a router in training gives, with even and with Zipf
ones. `dense` is XLA's plain matmul of as many operations with one matrix: the ceiling. `torch` is
torch._grouped_mm in the same process. Times are of the op as it is called, from sizes to result.
"""

# R rows  D in  F out  E experts

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from experiments.bench.suites import grouped_fp8
from moe_jax.ops.grouped_matmul import grouped_matmul, layout, mosaic_gpu, weight_grad, xla
from moe_jax.ops.grouped_matmul.specs import LARGE, SIZES, Spec, even

# TFLOP/s of large dense bfloat16 matmuls under the chip's power limit, not the data sheet's 989
LIMIT = 790.0
_BACKENDS = {'mosaic': mosaic_gpu, 'xla': xla}


def run(only: str = '') -> Iterator[list[table.Row]]:
  for spec, label in cases():
    if only in spec.name:
      yield run_case(spec, label)
  yield from grouped_fp8.run(only)


def cases() -> Iterator[tuple[Spec, str]]:
  if jax.default_backend() != 'gpu':
    yield Spec(name='tiny', rows=512, d=64, f=128, sizes=even(512, 4)), 'tiny'
    return
  for spec in LARGE:
    for label, sizes in SIZES.items():
      if (spec.name, label) == ('v3_narrow', 'zipf'):
        continue
      yield dataclasses.replace(spec, sizes=sizes(spec.rows, len(spec.sizes))), label


@functools.partial(jax.jit, static_argnames='implementation')
def forward(x, w, sizes, implementation):
  return grouped_matmul(x, w, sizes, implementation=implementation)


@functools.partial(jax.jit, static_argnames='implementation')
def dgrad(dy, w, sizes, implementation):
  offsets = layout.compact_offsets(sizes)
  return _BACKENDS[implementation].forward(dy, w, offsets, sizes, transpose_w=True)


@functools.partial(jax.jit, static_argnames=('implementation', 'dtype'))
def wgrad(x, dy, sizes, implementation, dtype):
  return weight_grad(x, dy, sizes, dtype=dtype, implementation=implementation)


@jax.jit
def dense(x, w):
  return jnp.matmul(x, w, preferred_element_type=jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=0)
def data(spec: Spec) -> tuple[jax.Array, jax.Array, jax.Array]:
  """x, w and dy; sizes do not matter to them."""
  kx, kw, ky = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(kx, (spec.rows, spec.d), jnp.bfloat16)
  w = jax.random.normal(kw, (len(spec.sizes), spec.d, spec.f), jnp.bfloat16) * spec.d**-0.5
  return x, w.astype(jnp.bfloat16), jax.random.normal(ky, (spec.rows, spec.f), jnp.bfloat16)


def run_case(spec: Spec, label: str) -> list[table.Row]:
  x, w, dy = data(spec)
  sizes = jnp.asarray(spec.sizes, jnp.int32)
  shape = f'{spec} R{spec.rows} D{spec.d} F{spec.f} E{len(spec.sizes)}'
  rows = []

  names = dict(shape=shape, sizes=label)

  def add(work: str, by: str, fn: Callable, *args: jax.Array, exact: Callable | None = None):
    # once a shape: sizes change which rows are whose, not how a row is summed
    error = exact(fn(*args)) if exact and label in ('uneven', 'tiny') else None
    rows.append(_row(spec, timing.measure_jax(fn, *args), work=work, by=by, error=error, **names))

  on_gpu = jax.default_backend() == 'gpu'
  if on_gpu:
    add('fwd', 'dense', dense, x, w[0])
  for by in ('mosaic', 'xla') if on_gpu and mosaic_gpu.on_hopper() else ('xla',):
    if by == 'xla' and on_gpu and (spec.name, label) != ('v2_lite', 'uneven'):
      continue
    use = functools.partial
    add('fwd', by, use(forward, implementation=by), x, w, sizes, exact=check_rows(spec, x, w))
    transposed = check_rows(spec, dy, w, transpose_w=True)
    add('dgrad', by, use(dgrad, implementation=by), dy, w, sizes, exact=transposed)
    if by == 'xla' and on_gpu:
      continue
    for dtype in ('bfloat16', 'float32'):
      fn = use(wgrad, implementation=by, dtype=dtype)
      add(f'wgrad {dtype}', by, fn, x, dy, sizes, exact=check_weights(spec, x, dy))
  return rows + torch_rows(spec, names)


def _row(spec: Spec, measured: timing.Timing, **names) -> table.Row:
  return table.row_of(measured, amount=spec.flops, limit=LIMIT, unit='TFLOP/s', **names)


def _some_experts(spec: Spec) -> list[tuple[int, int, int]]:
  """Expert, first row and end of the first, the largest and the last that has rows."""
  ends = np.cumsum(spec.sizes)
  have = [e for e, size in enumerate(spec.sizes) if size]
  some = {have[0], int(np.argmax(spec.sizes)), have[-1]}
  return [(e, int(ends[e]) - spec.sizes[e], int(ends[e])) for e in sorted(some)]


def _error(got: jax.Array, exact: np.ndarray) -> float:
  return float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))


def check_rows(
  spec: Spec, x: jax.Array, w: jax.Array, *, transpose_w: bool = False
) -> Callable[[jax.Array], float]:
  """Relative error against float64 over the edges of some groups."""

  def check(y: jax.Array) -> float:
    worst = 0.0
    for e, start, end in _some_experts(spec):
      at = np.unique(np.r_[start : min(start + 8, end), max(start, end - 8) : end])
      w_e = np.asarray(w[e], np.float64)
      exact = np.asarray(x[at], np.float64) @ (w_e.T if transpose_w else w_e)
      worst = max(worst, _error(y[at], exact))
    return worst

  return check


def check_weights(spec: Spec, x: jax.Array, dy: jax.Array) -> Callable[[jax.Array], float]:
  """Relative error against float64 over a corner of some experts."""

  def check(dw: jax.Array) -> float:
    worst = 0.0
    for e, start, end in _some_experts(spec):
      x_part = np.asarray(x[start:end, :128], np.float64)
      exact = x_part.T @ np.asarray(dy[start:end, -128:], np.float64)
      worst = max(worst, _error(dw[e, :128, -128:], exact))
    return worst

  return check


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
    measured = timing.measure(call, [()], block=lambda _: torch.cuda.synchronize())
    rows.append(_row(spec, measured, work=work, by='torch', **names))
  del x, dy, w, w_t
  torch.cuda.empty_cache()
  return rows
