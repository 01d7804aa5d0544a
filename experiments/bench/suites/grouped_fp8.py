"""Grouped matmul in FP8 with 1x128 and 128x128 scales, the rows of suite grouped_matmul for it.

Operands are quantised before the clock starts, but for the row `linear`: forward, both gradients
and every quantisation of one expert layer from its bfloat16 x, w and dy. `dense` is XLA's matmul of
as many operations with one matrix and no scales; `torch` is torch._scaled_grouped_mm with one scale
a row. Groups start on multiples of 128 rows, and only rows of groups are counted. Errors are those
of float32 results against float64.
"""

# R rows  D in  F out  E experts

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from moe_jax.ops.grouped_matmul import (
  grouped_matmul_fp8,
  mosaic_gpu,
  weight_grad_fp8,
)
from moe_jax.ops.grouped_matmul.specs import LARGE_FP8, SIZES, Spec, even
from moe_jax.ops.quantize import (
  Quantized,
  quantize_blocks,
  quantize_rows_and_columns,
  transpose_blocks,
)

# TFLOP/s of large dense FP8 matmuls under the chip's power limit
LIMIT = 1430.0


@dataclasses.dataclass(frozen=True)
class Call:
  """One row: a function of operands, which are taken by name from what `data` makes."""

  work: str
  by: str
  fn: Callable
  operands: tuple[str, ...]
  times: int = 1


def run(only: str) -> Iterator[list[table.Row]]:
  specs = [spec for spec in LARGE_FP8 if only in spec.name]
  if jax.default_backend() != 'gpu':
    tiny = Spec(name='fp8_tiny', rows=512, d=128, f=256, sizes=even(512, 4))
    specs = [tiny] if only in tiny.name else []
  elif not mosaic_gpu.on_hopper():
    return
  operands = [functools.partial(data, spec) for spec in specs]
  calls = [calls_of(spec) for spec in specs]
  todo = [(make, ()) for make in operands]
  for make, some in zip(operands, calls, strict=True):
    shape = jax.eval_shape(make)
    todo += [(call.fn, tuple(shape[name] for name in call.operands)) for call in some]
  # all at once: most of the time otherwise
  compiled = iter(timing.compile_all(todo))
  operands = [next(compiled) for _ in specs]
  for spec, make, some in zip(specs, operands, calls, strict=True):
    yield run_case(spec, make(), [(call, next(compiled)) for call in some])


def data(spec: Spec) -> dict[str, Any]:
  """Room for groups of any sizes, each filled up to a multiple of 128 rows.

  Rows of nobody are as others: an expert's gradient would be wrong, and takes the same time.
  """
  num_experts = len(spec.sizes)
  num_rows = spec.rows + num_experts * 128
  kx, kw, ky = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(kx, (num_rows, spec.d), jnp.bfloat16)
  w = jax.random.normal(kw, (num_experts, spec.d, spec.f), jnp.bfloat16)
  dy = jax.random.normal(ky, (num_rows, spec.f), jnp.bfloat16)
  (x8, x8_t), (dy8, dy8_t) = quantize_rows_and_columns(x), quantize_rows_and_columns(dy)
  w8 = quantize_blocks(w)
  made = dict(x=x, w=w, dy=dy, x8=x8, x8_t=x8_t, dy8=dy8, dy8_t=dy8_t, w8=w8)
  return made | dict(w8_t=transpose_blocks(w8), sizes=jnp.asarray(spec.sizes, jnp.int32))


def rows(x: Quantized, w: Quantized, sizes: jax.Array, *, dtype: str = 'bfloat16') -> jax.Array:
  return grouped_matmul_fp8(x, w, sizes, dtype=dtype)


def weights(x: Quantized, dy: Quantized, sizes: jax.Array, *, dtype: str) -> jax.Array:
  return weight_grad_fp8(x, dy, sizes, dtype=dtype)


@functools.partial(jax.jit, compiler_options={'xla_gpu_enable_triton_gemm': False})
def dense(x: Quantized, w: Quantized) -> jax.Array:
  """By cuBLASLt, in whose place XLA would try Triton's kernels for half a minute."""
  return jnp.einsum('rk,nk->rn', x.values, w.values[0], preferred_element_type=jnp.bfloat16)


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


def calls_of(spec: Spec) -> list[Call]:
  by = 'mosaic' if jax.default_backend() == 'gpu' else 'xla'
  columns, wide = ('x8_t', 'dy8_t', 'sizes'), functools.partial(weights, dtype='float32')
  narrow = functools.partial(weights, dtype='bfloat16')
  wgrad = Call('fp8 wgrad bfloat16', by, narrow, columns)
  if spec.name == 'fp8_deepgemm_wgrad':
    return [wgrad]
  calls = [
    Call('fp8 fwd', 'dense', dense, ('x8', 'w8_t')),
    Call('fp8 fwd', by, rows, ('x8', 'w8_t', 'sizes')),
  ]
  if spec.name not in ('fp8_linear', 'fp8_tiny'):
    return calls
  return [
    *calls,
    Call('fp8 dgrad', by, rows, ('dy8', 'w8', 'sizes')),
    wgrad,
    Call('fp8 wgrad float32', by, wide, columns),
    Call('fp8 linear, with quantisation', by, linear, ('x', 'w', 'dy', 'sizes'), times=3),
  ]


def run_case(
  spec: Spec, operands: dict[str, Any], calls: list[tuple[Call, Any]]
) -> list[table.Row]:
  shape = f'{spec} R{spec.rows} D{spec.d} F{spec.f} E{len(spec.sizes)}'
  found = []

  def add(call: Call, compiled: Any, label: str, sizes: tuple[int, ...]):
    own = operands | dict(sizes=jnp.asarray(sizes, jnp.int32))
    args: list[Any] = [own[name] for name in call.operands]
    error = None
    if call.work == 'fp8 wgrad float32':
      error = weights_error(sizes, args[0], args[1], compiled(*args))
    flops = spec.flops
    if call.by == 'dense':
      flops = flops * args[0].values.shape[0] // spec.rows
    found.append(
      table.row_of(
        timing.measure_jax(compiled, *args, repeats=6),
        amount=call.times * flops,
        limit=LIMIT,
        unit='TFLOP/s',
        work=call.work,
        by=call.by,
        error=error,
        shape=shape,
        sizes=label,
      )
    )

  labels = SIZES if jax.default_backend() == 'gpu' else {'even': even}
  for call, compiled in calls:
    for label, sizes in labels.items():
      # sizes change nothing for one, and little for the others
      once = call.by == 'dense' or call.times > 1 or call.work == 'fp8 wgrad float32'
      if label == 'even' or not once:
        add(call, compiled, label, sizes(spec.rows, len(spec.sizes)))
  return found + torch_rows(spec, shape)


def _exact(values: Any, scale: Any) -> np.ndarray:
  """float64 numbers of quantised rows; a scale for each 128 columns."""
  return np.asarray(values, np.float64) * np.repeat(np.asarray(scale, np.float64), 128, axis=1)


def weights_error(sizes: tuple[int, ...], x: Quantized, dy: Quantized, dw: jax.Array) -> float:
  """Of a corner of the first expert, whose rows are multiples of 128."""
  own, blocks = sizes[0], sizes[0] // 128
  x_part = _exact(x.values[:8, :own], x.scale[:blocks, :8].T)
  dy_part = _exact(dy.values[:128, :own], dy.scale[:blocks, :128].T)
  exact, got = x_part @ dy_part.T, np.asarray(dw[0, :8, :128], np.float64)
  return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def torch_rows(spec: Spec, shape: str) -> list[table.Row]:
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
    measured, amount=spec.flops, limit=LIMIT, unit='TFLOP/s', work='fp8 fwd', by='torch',
    shape=shape, sizes='even',
  )  # fmt: skip
  del x, w
  torch.cuda.empty_cache()
  return [row]
