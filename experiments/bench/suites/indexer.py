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

import functools
from collections.abc import Iterator

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
    yield by_length(64, heads=8, width=16, k=8)
    return
  if only in 'bar':
    yield bar()
  for length in LENGTHS:
    if only in f'length {length}':
      yield by_length(length, heads=64, width=128, k=2048)
  for length in LENGTHS[-2:]:
    if only in f'v4 S{length}':
      yield of_entries(v4_attention.Case('csa', length), heads=64, width=128)


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


def by_length(length: int, *, heads: int, width: int, k: int) -> list[table.Row]:
  """Choice of every query's keys, causal."""
  q, key, weight = data(length, length, heads, width)
  first, end = jnp.zeros((length,), jnp.int32), jnp.arange(1, length + 1, dtype=jnp.int32)
  args = q, key, weight, first, end
  calls = [(functools.partial(select_keys, k=k, fp8=fp8), args) for fp8 in (False, True)]
  rows = []
  for call, dtype in zip(timing.compile_all(calls), ('bfloat16', 'float8'), strict=True):
    measured = timing.measure(call, [args], block=jax.block_until_ready, repeats=3)
    pairs = length * (length + 1) / 2
    rows.append(
      table.row_of(
        measured, amount=2 * pairs * heads * width, limit=LIMIT['TFLOP/s'], unit='TFLOP/s',
        work=f'select {dtype}', by='kernels' if jax.default_backend() == 'gpu' else 'xla',
        shape=f'length S{length} J{heads} I{width} k{k}', length=length,
        gigabytes=(8 * pairs + q.nbytes + 4 * length * k) / 1e9, peak_gib=timing.peak_gib(call),
      )
    )  # fmt: skip
  return rows


def of_entries(case: v4_attention.Case, *, heads: int, width: int) -> list[table.Row]:
  """The choice of V4's entries, and learning it."""
  S, N, J, I = case.length, case.length // case.ratio, heads, width
  q, _, entry, _, seen, index, _ = jax.jit(functools.partial(v4_attention.data, case))()
  q_index, k_index, weight = data(S, N, J, I)
  scored = q_index[None], k_index[None], weight[None]
  # about what random scores sum to
  lse = jnp.full((1, S, case.heads), 10.0)

  def choice(scored, seen):
    q, k, weight = scored
    return entry_index.choose(q, k, weight, seen.entry_first_BS, seen.entry_count_BS, k=case.chosen)

  def loss(scored, q, entry, lse, seen, index):
    mass = sink_attention.chosen_mass(q, entry, lse, seen, index, scale=case.width**-0.5)
    used = jnp.arange(case.chosen) < seen.entry_count_BS[..., None]

    def of(scored):
      q, k, weight = scored
      score = entry_index.chosen_scores(q, k, weight, index)
      return entry_index.index_loss(score, mass, used, used[..., 0])

    return jax.value_and_grad(of)(scored)

  pairs = lambda seen: int(np.asarray(seen.entry_count_BS, np.int64).sum())
  # the loss multiplies once in the attention's heads, and three times in the indexer's
  learned = 2 * case.heads * case.width + 6 * J * I
  works = {
    'choice': (choice, (scored, case.may_see()), 2 * J * I * pairs(case.may_see())),
    'loss': (loss, (scored, q, entry, lse, seen, index), learned * pairs(seen)),
  }
  compiled = timing.compile_all((call, args) for call, args, _ in works.values())
  rows = []
  for (work, (_, args, amount)), call in zip(works.items(), compiled, strict=True):
    measured = timing.measure(call, [args], block=jax.block_until_ready, repeats=3)
    rows.append(
      table.row_of(
        measured, amount=amount, limit=LIMIT['TFLOP/s'], unit='TFLOP/s', work=work, by='csa',
        shape=f'v4 S{S} N{N} J{J} I{I} k{case.chosen}', peak_gib=timing.peak_gib(call),
      )
    )  # fmt: skip
  return rows
