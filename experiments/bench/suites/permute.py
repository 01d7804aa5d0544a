"""Tokens to expert order and back: choosing, sorting, moving and summing rows.

Useful bytes are those any way of doing it must move: each token read once, each row written once,
and the other way round. `xla` is the reference as XLA compiles it; torch's are index_select and
a sum of gathered rows, each call dispatched by itself. Ours are timed six to a program.
"""

# T tokens  D width  K choices a token  R rows  E experts

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import table, timing
from moe_jax.ops import pallas_triton
from moe_jax.ops.permute import sort_by_destination, spread_rows, sum_rows
from moe_jax.ops.route import top_k_route

BANDWIDTH = 3000.0  # GB/s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  name: str
  tokens: int
  d: int
  k: int
  experts: int

  def __str__(self) -> str:
    return f'T{self.tokens} D{self.d} K{self.k} E{self.experts}'


SPECS = (
  Spec(name='fine', tokens=24576, d=1536, k=8, experts=128),
  Spec(name='v2_lite', tokens=32768, d=2048, k=6, experts=64),
  Spec(name='moe_1b', tokens=65536, d=1024, k=8, experts=64),
  Spec(name='v3', tokens=16384, d=7168, k=8, experts=256),
)
TINY = Spec(name='tiny', tokens=256, d=128, k=2, experts=8)
# deviation of the experts' favour with the router, against tokens' own of 1
SKEWS = {'even': 0.0, 'skewed': 1.0}


def run(only: str = '') -> Iterator[list[table.Row]]:
  on_gpu = jax.default_backend() == 'gpu'
  for spec in SPECS if on_gpu else (TINY,):
    if only in spec.name:
      for label, skew in SKEWS.items():
        if label == 'even' or spec.name in ('fine', 'tiny'):
          yield run_case(spec, label, skew)


def run_case(spec: Spec, label: str, skew: float) -> list[table.Row]:
  T, D, K, E = spec.tokens, spec.d, spec.k, spec.experts
  R, keys = T * K, jax.random.split(jax.random.key(0), 4)
  score = jax.random.normal(keys[0], (T, E)) + skew * jax.random.normal(keys[1], (E,))
  bias = jnp.zeros(E)
  expert = jax.lax.top_k(score, K)[1].astype(jnp.int32)
  x, weight = jax.random.normal(keys[2], (T, D), jnp.bfloat16), jax.random.uniform(keys[3], (T, K))
  sort = functools.partial(sort_by_destination, num_destinations=E, num_rows=R)
  plan = jax.jit(sort)(expert)
  y = jax.jit(lambda x, p: spread_rows(x, p, implementation='xla'))(x, plan)
  rows: list[table.Row] = []

  def add(work: str, by: str, fn: Callable, *args: Any, moved: float) -> None:
    measured = timing.measure_together(fn, *args)
    names = dict(work=work, by=by, shape=str(spec), sizes=label)
    rows.append(table.row_of(measured, amount=moved, unit='GB/s', limit=BANDWIDTH, **names))

  for by in ('triton', 'xla') if pallas_triton.unavailable() is None else ('xla',):
    use = functools.partial
    choose = lambda s, b, by=by: top_k_route(s, b, k=K, implementation=by)
    add('top k', by, choose, score, bias, moved=4 * T * (E + 2 * K))
    add('sort', by, use(sort, implementation=by), expert, moved=3 * 4 * R)
    add('spread', by, use(spread_rows, implementation=by), x, plan, moved=2 * D * (T + R))
  add('weighted sum', 'xla', sum_rows, y, plan.row_TK, weight, moved=2 * D * (T + R))
  return rows + torch_rows(spec, label, plan.token_R, plan.row_TK)


def torch_rows(spec: Spec, label: str, token_R: jax.Array, row_TK: jax.Array) -> list[table.Row]:
  try:
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError:
    return []
  if not torch.cuda.is_available():
    return []
  T, D, K = spec.tokens, spec.d, spec.k
  make = functools.partial(torch.randn, device='cuda')
  x, y = make(T, D, dtype=torch.bfloat16), make(T * K, D, dtype=torch.bfloat16)
  weight = make(T, K, 1, dtype=torch.bfloat16)
  index = lambda a: torch.from_dlpack(a.reshape(-1)).long()
  token, row = index(token_R), index(row_TK)
  moved = 2 * D * (T + T * K)
  calls = {
    'spread': lambda: x.index_select(0, token),
    'weighted sum': lambda: (y.index_select(0, row).view(T, K, D) * weight).sum(1),
  }
  rows = []
  for work, call in calls.items():
    measured = timing.measure(call, [()], block=lambda _: torch.cuda.synchronize(), repeats=5)
    names = dict(work=work, by='torch', shape=str(spec), sizes=label)
    rows.append(table.row_of(measured, amount=moved, unit='GB/s', limit=BANDWIDTH, **names))
  del x, y
  torch.cuda.empty_cache()
  return rows
