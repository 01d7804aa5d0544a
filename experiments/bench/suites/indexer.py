"""The lightning indexer: scores of all pairs, exact top-k of their rows, and the two together.

`scores` are 2 J I operations a pair that is made. `top_k` and `select` read float32 scores once,
which is what their bytes count; `select` makes them too. Rows by length are of that many queries
and keys, causal, in chunks: scores never exceed 512 MiB. Errors of scores are relative to float32
products of the same inputs; float8's are its rounding. `lax.top_k` is XLA's own, unstable one.

`v4` is what a layer of V4's CSA (see v4_attention) has besides: `choice` of 512 entries, one of
every 4 tokens, and `loss`: what they got of the attention of 64 heads of 512, their index scores
again, and the loss with its gradients.
"""

# S queries  T keys  J index heads  I index width  N entries

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from experiments.bench.suites import v4_attention
from moe_jax.ops import entry_index, sink_attention
from moe_jax.ops.indexer import index_scores, mosaic_scores, select, select_keys, triton_top_k

LIMIT = {'TFLOP/s': 790.0, 'GB/s': 3000.0}
# queries, keys, heads, width, k
BAR = (4096, 32768, 64, 128, 2048)
LENGTHS = tuple(1024 * n for n in (4, 16, 64, 128))


def run(only: str = '') -> Iterator[list[table.Row]]:
  if jax.default_backend() != 'gpu':
    tiny = ByLength(64, heads=8, width=16, k=8)
    yield tiny.run(timing.compile_all(tiny.calls()))
    return
  cases = [ByLength(length) for length in LENGTHS if only in f'length {length}']
  layers = [v4_attention.Case('csa', n) for n in LENGTHS[-2:] if only in f'v4 S{n}']
  calls = [case.calls() for case in cases] + [entry_calls(case) for case in layers]
  programs = timing.compile_all(call for of_case in calls for call in of_case)
  if only in 'bar':
    yield bar()
  for i, case in enumerate(cases):
    yield case.run(programs[2 * i : 2 * i + 2])
  for i, case in enumerate(layers, len(cases)):
    yield of_entries(case, programs[2 * i : 2 * i + 2])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def data(S: int, T: int, J: int, I: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  keys = jax.random.split(jax.random.key(0), 3)
  draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
  weight_SJ = draw(keys[2], S, J).astype(jnp.float32) * (J * I) ** -0.5
  return draw(keys[0], S, J, I), draw(keys[1], T, I), weight_SJ


def bar() -> list[table.Row]:
  S, T, J, I, k = BAR
  q, key, weight = data(S, T, J, I)
  first, end = jnp.zeros((S,), jnp.int32), jnp.full((S,), T, jnp.int32)
  (q8, q_scale), (k8, k_scale) = jax.jit(lambda a, b: tuple(map(select.quantize, (a, b))))(q, key)
  some = jnp.arange(0, S, S // 4)
  exact = jax.jit(lambda q, k, w: index_scores(q[None], k[None], w[None])[0] * I**0.5)(
    q[some].astype(jnp.float32), key.astype(jnp.float32), weight[some]
  )
  make = lambda *a: mosaic_scores.scores(*a)
  score = jax.jit(lambda q, k, w: make(q, k, w, None, first, end))(q, key, weight)
  dense = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
  calls = {
    ('dense matmul', 'xla'): (lambda a, b: a @ b, (dense, dense)),
    ('scores bfloat16', 'mosaic'): (make, (q, key, weight, None, first, end)),
    ('scores float8', 'mosaic'): (make, (q8, k8, weight * q_scale, k_scale, first, end)),
    ('top_k', 'triton'): (
      lambda s, a, b: triton_top_k.top_k(s, a, b, k=k),
      (score, first, end),
    ),
    ('top_k', 'lax.top_k'): (lambda s: jax.lax.top_k(s, k, is_stable=False)[1], (score,)),
  }
  compiled = timing.compile_all(calls.values())
  rows = []
  for (work, by), call, (_, args) in zip(calls, compiled, calls.values(), strict=True):
    top = work == 'top_k'
    amount = 4.0 * S * T if top else 2.0 * S * T * J * I
    if work == 'dense matmul':
      amount = 2.0 * 8192**3
    got, error = call(*args), None
    if work.startswith('scores'):
      error = float(jnp.linalg.norm(got[some] - exact) / jnp.linalg.norm(exact))
    if (work, by) == ('top_k', 'triton'):
      error = float(sum(_missed(score[row], got[row], k) for row in np.asarray(some)))
    measured = timing.measure(call, [args], block=jax.block_until_ready)
    unit = 'GB/s' if top else 'TFLOP/s'
    names = dict(work=work, by=by, shape=f'bar S{S} T{T} J{J} I{I} k{k}', error=error)
    rows.append(table.row_of(measured, amount=amount, limit=LIMIT[unit], unit=unit, **names))
  return rows


def _missed(score_T: jax.Array, place_K: jax.Array, k: int) -> int:
  """How many of the k best, the earliest of equals, are not there."""
  best = np.argsort(-np.asarray(score_T), kind='stable')[:k]
  return k - np.intersect1d(best, np.asarray(place_K)).size


@dataclasses.dataclass(frozen=True)
class ByLength:
  """Choice of every query's keys, causal, in bfloat16 and in float8."""

  length: int
  heads: int = 64
  width: int = 128
  k: int = 2048

  def operands(self) -> tuple[jax.Array, ...]:
    length = self.length
    end = jnp.arange(1, length + 1, dtype=jnp.int32)
    return *data(length, length, self.heads, self.width), jnp.zeros_like(end), end

  def calls(self) -> list[tuple[Callable, tuple]]:
    args = jax.eval_shape(self.operands)
    return [(functools.partial(select_keys, k=self.k, fp8=fp8), args) for fp8 in (False, True)]

  def run(self, programs: Sequence[jax.stages.Compiled]) -> list[table.Row]:
    args = self.operands()
    rows = []
    for call, dtype in zip(programs, ('bfloat16', 'float8'), strict=True):
      measured = timing.measure(call, [args], block=jax.block_until_ready, repeats=3)
      pairs = self.length * (self.length + 1) / 2
      moved = 8 * pairs + args[0].nbytes + 4 * self.length * self.k
      rows.append(
        table.row_of(
          measured, amount=2 * pairs * self.heads * self.width, limit=LIMIT['TFLOP/s'],
          unit='TFLOP/s', work=f'select {dtype}',
          by='kernels' if jax.default_backend() == 'gpu' else 'xla',
          shape=f'length S{self.length} J{self.heads} I{self.width} k{self.k}',
          length=self.length, gigabytes=moved / 1e9, peak_gib=timing.peak_gib(call),
        )
      )  # fmt: skip
    return rows


# of V4's indexer
_HEADS, _WIDTH = 64, 128


def entry_operands(case: v4_attention.Case) -> tuple:
  """What the indexer multiplies, what each query may see; and what its loss is made from."""
  q, _, entry, _, seen, index, _ = v4_attention.data(case)
  scored = data(case.length, case.length // case.ratio, _HEADS, _WIDTH)
  # about what random scores sum to
  lse = jnp.full((1, case.length, case.heads), 10.0)
  return tuple(a[None] for a in scored), case.may_see(), (q, entry, lse, seen, index)


def entry_calls(case: v4_attention.Case) -> list[tuple[Callable, tuple]]:
  """The choice of V4's entries, and learning it."""

  def choice(scored, seen):
    q, k, weight = scored
    return entry_index.choose(q, k, weight, seen.entry_first_BS, seen.entry_count_BS, k=case.chosen)

  def loss(scored, operands):
    q, entry, lse, seen, index = operands
    mass = sink_attention.chosen_mass(q, entry, lse, seen, index, scale=case.width**-0.5)
    used = jnp.arange(case.chosen) < seen.entry_count_BS[..., None]

    def of(scored):
      q, k, weight = scored
      score = entry_index.chosen_scores(q, k, weight, index)
      return entry_index.index_loss(score, mass, used, used[..., 0])

    return jax.value_and_grad(of)(scored)

  scored, may_see, operands = jax.eval_shape(functools.partial(entry_operands, case))
  return [(choice, (scored, may_see)), (loss, (scored, operands))]


def of_entries(case: v4_attention.Case, programs: Sequence[jax.stages.Compiled]) -> list[table.Row]:
  scored, may_see, operands = jax.jit(functools.partial(entry_operands, case))()
  pairs = lambda seen: int(np.asarray(seen.entry_count_BS, np.int64).sum())
  each = 2 * _HEADS * _WIDTH
  # the loss multiplies once in the attention's heads, and three times in the indexer's
  learned = 2 * case.heads * case.width + 3 * each
  works = {
    'choice': ((scored, may_see), each * pairs(may_see)),
    'loss': ((scored, operands), learned * pairs(operands[3])),
  }
  rows = []
  for (work, (args, amount)), call in zip(works.items(), programs, strict=True):
    measured = timing.measure(call, [args], block=jax.block_until_ready, repeats=3)
    shape = f'v4 S{case.length} N{case.length // case.ratio} J{_HEADS} I{_WIDTH} k{case.chosen}'
    rows.append(
      table.row_of(
        measured, amount=amount, limit=LIMIT['TFLOP/s'], unit='TFLOP/s', work=work, by='csa',
        shape=shape, peak_gib=timing.peak_gib(call),
      )
    )  # fmt: skip
  return rows
