"""Dense causal attention in bfloat16, forward and backward, within documents and windows.

`bwd` takes what the forward pass kept and makes dq, dk and dv. Operations are those of visible
pairs: 2 (C + V) a pair forward, 2 (3 C + 2 V) backward. `dense` is XLA's plain matmul: the ceiling.
Errors are the largest of the results' last 64 rows, relative to float64. Bytes are counted: every
operand and result once, keys and values included, and in the backward pass once more for each of
its two kernels.
"""

# B batch  S sequence  H heads  C key width  V value width

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from moe_jax.ops import attention as op
from moe_jax.ops.attention import mosaic

# TFLOP/s of large dense bfloat16 matmuls under the chip's power limit, not the data sheet's 989
LIMIT = 790.0
_CHECKED = 64
_SINK = 1.0


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  batch: int
  length: int
  heads: int
  widths: tuple[int, int] = (192, 128)
  window: int | None = None
  packed: bool = False
  sinks: bool = False

  @property
  def shape(self) -> str:
    C, V = self.widths
    return f'{self.name} B{self.batch} S{self.length} H{self.heads} {C}/{V}'

  def segments(self) -> np.ndarray:
    """One document a row, or documents of log-normal length, about 1000 tokens at the median."""
    segment_BS = np.zeros((self.batch, self.length), np.int32)
    rng = np.random.default_rng(0)
    for row in segment_BS if self.packed else ():
      at = 0
      while (at := at + max(16, int(rng.lognormal(np.log(700), 1.0)))) < self.length:
        row[at:] += 1
    return segment_BS

  def pairs(self) -> float:
    """Visible pairs of a query and a key, of one head."""
    segment_BS, pairs = self.segments(), 0.0
    for row in segment_BS:
      _, size = np.unique(row, return_counts=True)
      short = np.minimum(size, self.window or self.length).astype(np.float64)
      pairs += (short * (short + 1) / 2 + (size - short) * short).sum()
    return pairs


BARS = (
  Case('mla', 1, 16384, 16),
  Case('mla', 4, 8192, 16),
  Case('mla', 1, 8192, 128),
  Case('packed', 16, 4096, 16, packed=True),
  Case('equal', 1, 32768, 16, (128, 128)),
  Case('equal', 1, 16384, 16, (64, 64)),
  Case('window1024', 1, 16384, 16, (128, 128), window=1024),
  Case('sinks', 1, 16384, 16, (128, 128), sinks=True),
)
LENGTHS = tuple(Case('length', 1, 1024 * k, 4) for k in (4, 16, 64, 128))


def run(only: str = '') -> Iterator[list[table.Row]]:
  if jax.default_backend() != 'gpu':
    yield run_case(Case('tiny', 1, 64, 2, (16, 8)))
    return
  for case in LENGTHS + BARS:
    if only in case.shape:
      yield run_case(case)


def backends(case: Case) -> dict[str, Callable]:
  """Attention of q, k, v and segments by each implementation that takes this case."""
  start = jnp.zeros(case.batch, jnp.int32)

  def ours(q, k, v, segment, by):
    segments = (segment, segment, start)
    sink = jnp.full(case.heads, _SINK) if case.sinks else None
    how: Any = dict(scale=case.widths[0] ** -0.5, window=case.window, implementation=by)
    return op.attention(q, k, v, *segments, sink, **how)

  def cudnn(q, k, v, _segment):
    # without documents cuDNN needs no mask, which is faster than the op's own use of it
    C, V = case.widths
    v = jnp.pad(v, ((0, 0),) * 3 + ((0, C - V),))
    local = None if case.window is None else (case.window - 1, 0)
    how: Any = dict(is_causal=True, local_window_size=local, implementation='cudnn')
    return jax.nn.dot_product_attention(q, k, v, **how)[..., :V]

  if jax.default_backend() != 'gpu':
    return {'reference': functools.partial(ours, by='reference')}
  found: dict[str, Callable] = {}
  if mosaic.on_hopper():
    found['mosaic'] = functools.partial(ours, by='mosaic')
  if case.name == 'length' or case.sinks:
    return found
  found['cudnn'] = functools.partial(ours, by='cudnn') if case.packed else cudnn
  return found


@functools.partial(jax.jit, static_argnums=0)
def data(case: Case) -> tuple[jax.Array, ...]:
  """q, k, v and do."""
  keys = jax.random.split(jax.random.key(0), 4)
  C, V = case.widths
  draw = lambda key, width: jax.random.normal(
    key, (case.batch, case.length, case.heads, width), jnp.bfloat16
  )
  return tuple(draw(key, width) for key, width in zip(keys, (C, C, V, V), strict=True))


def run_case(case: Case) -> list[table.Row]:
  shapes = q, k, v, do = jax.eval_shape(functools.partial(data, case))
  segment = jax.ShapeDtypeStruct(q.shape[:2], jnp.int32)
  calls: dict[tuple[str, str], tuple[Callable, tuple]] = {
    ('', 'data'): (functools.partial(data, case), ())
  }
  kinds: dict[str, Any] = {}
  for by, fn in backends(case).items():
    keep = functools.partial(_keep, fn, by, kinds)
    kept = jax.eval_shape(keep, q, k, v, segment)
    pull = lambda kept, do, by=by: kinds[by].unflatten(kept)(do)
    calls[by, 'fwd'] = fn, (q, k, v, segment)
    calls[by, 'keep'] = keep, (q, k, v, segment)
    calls[by, 'bwd'] = pull, (kept, do)
  compiled = dict(zip(calls, timing.compile_all(calls.values()), strict=True))
  C, V = case.widths
  flops = case.heads * case.pairs()
  work = {'fwd': 2 * (C + V) * flops, 'bwd': 2 * (3 * C + 2 * V) * flops}
  gigabytes = _gigabytes(*shapes)
  rows = []

  def add(name: str, by: str, args: tuple, want: tuple[np.ndarray, ...]):
    call = compiled[by, name]
    got = jax.tree.leaves(call(*args))
    error = max(_error(*pair) for pair in zip(got, want, strict=True))
    # long inputs take long enough to need few repeats
    repeats = 10 if work[name] < 2e13 else 3
    measured = timing.measure(call, [args], block=jax.block_until_ready, repeats=repeats)
    rows.append(
      table.row_of(
        measured, amount=work[name], limit=LIMIT, unit='TFLOP/s', work=name, by=by,
        shape=case.shape, gigabytes=gigabytes[name], error=error, peak_gib=timing.peak_gib(call),
        length=case.length if case.name == 'length' else None,
      )
    )  # fmt: skip

  q, k, v, do = compiled['', 'data']()
  segment = jnp.asarray(case.segments())
  exact = _last_rows(case, q, k, v, do)
  for by in kinds:
    add('fwd', by, (q, k, v, segment), exact[:1])
    add('bwd', by, (compiled[by, 'keep'](q, k, v, segment), do), exact[1:])
  if case.name == 'mla':
    rows.append(_dense())
  return rows + (torch_rows(case, work, gigabytes) if not case.packed else [])


def _keep(fn: Callable, by: str, kinds: dict, q, k, v, segment) -> list[jax.Array]:
  """What the forward pass keeps; what is to be done with it goes to kinds[by]."""
  pull = jax.vjp(lambda *qkv: fn(*qkv, segment), q, k, v)[1]
  leaves, kinds[by] = jax.tree.flatten(pull)
  return leaves


def _gigabytes(q, k, v, do) -> dict[str, float]:
  lse = 4 * q.size // q.shape[-1]
  inputs, o = sum(a.size * a.dtype.itemsize for a in (q, k, v)), do.size * do.dtype.itemsize
  # delta reads o and do; two kernels read the inputs, do, lse and delta, and write dq, dk and dv
  backward = 2 * o + lse + 2 * (inputs + o + 2 * lse) + inputs
  return {'fwd': (inputs + o + lse) / 1e9, 'bwd': backward / 1e9}


def _dense() -> table.Row:
  a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
  measured = timing.measure_jax(jax.jit(jnp.matmul), a, a)
  names = dict(work='matmul', shape='8192 x 8192 x 8192', by='dense')
  return table.row_of(measured, amount=2 * 8192**3, limit=LIMIT, unit='TFLOP/s', **names)


def _error(got: jax.Array, want: np.ndarray) -> float:
  last = np.asarray(got[0, -_CHECKED:, 0], np.float64)
  return float(np.linalg.norm(last - want) / np.linalg.norm(want))


def _last_rows(case: Case, *operands: jax.Array) -> tuple[np.ndarray, ...]:
  """o, dq, dk and dv of the last tokens of the first row and head; no other query sees those."""
  q, k, v, do = (np.asarray(a[0, :, 0], np.float64) for a in operands)
  q, do, i = q[-_CHECKED:], do[-_CHECKED:], np.arange(case.length)
  scale, segment = case.widths[0] ** -0.5, case.segments()[0]
  ahead = i[-_CHECKED:, None] - i
  mask = (ahead >= 0) & (ahead < (case.window or case.length))
  s = np.where(mask & (segment[-_CHECKED:, None] == segment), q @ k.T * scale, -np.inf)
  most = s.max(-1, keepdims=True)
  p = np.exp(s - most)
  p /= p.sum(-1, keepdims=True) + (np.exp(_SINK - most) if case.sinks else 0)
  dp = do @ v.T
  ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
  return p @ v, ds @ k, (ds.T @ q)[-_CHECKED:], (p.T @ do)[-_CHECKED:]


def torch_rows(case: Case, work: dict[str, float], gigabytes: dict[str, float]) -> list[table.Row]:
  """scaled_dot_product_attention by the backend that torch picks; it knows no windows."""
  try:
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError:
    return []
  if not torch.cuda.is_available() or case.window or case.sinks or case.name == 'length':
    return []
  make = lambda width: torch.randn(
    case.batch, case.heads, case.length, width, device='cuda', dtype=torch.bfloat16,
    requires_grad=True,
  )  # fmt: skip
  q, k, v = (make(width) for width in (case.widths[0], *case.widths))
  do = torch.randn_like(v)
  forward = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
  rows = []
  try:
    o = forward()
    backward = lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
    for name, call in (('fwd', forward), ('bwd', backward)):
      torch.cuda.reset_peak_memory_stats()
      measured = timing.measure(call, [()], block=lambda _: torch.cuda.synchronize())
      peak = torch.cuda.max_memory_allocated() / 2**30
      rows.append(
        table.row_of(
          measured, amount=work[name], limit=LIMIT, unit='TFLOP/s', work=name, by='torch',
          shape=case.shape, gigabytes=gigabytes[name], peak_gib=peak,
        )
      )  # fmt: skip
  except RuntimeError as e:
    print(f'torch, {case.shape}: {str(e).splitlines()[0]}', flush=True)
  del q, k, v, do
  torch.cuda.empty_cache()
  return rows
