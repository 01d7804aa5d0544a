"""Attention of MLA over the latents that each query names, and V3.2's attention beside dense MLA.

`fwd` and `bwd` are of ops.sparse_mla: 2 (2 V + C) operations a head and pair forward, 2 (5 V + 3 C)
backward. Queries are the last of a sequence and name random keys before them, in order. Errors are
the largest of a few queries' results and gradients, relative to float32. `dense` is ops.attention
with MLA's expanded widths and as many heads, causal.

Bytes are counted: every operand and result once; of the gathered latents, each that the queries in
flight (one block of 64 heads on each of 132 SMs) name, once, assuming that blocks in flight share
what L2 brings; and what the backward pass keeps in device memory between its kernels.

`step` is one layer's training step: choice of keys, attention, the indexer's loss with its
gradient, and the backward pass, beside dense attention's two passes. Its parts whose cost does not
depend on the query's place are timed on the last eighth of the queries and count eight times; dense
attention is timed on an eighth of the heads.
"""

# T queries  S keys  H heads  V latent (value) width  C rope width  K slots of a query

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from moe_jax.ops.attention import attention
from moe_jax.ops.indexer import select_keys, sparse_index_loss
from moe_jax.ops.sparse_mla import key_mass, mosaic, sparse_mla
from moe_jax.ops.sparse_mla.mosaic_forward import HEADS, Keys

LIMIT = 790.0
_SMS = 132


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  queries: int
  keys: int
  heads: int
  slots: int = 2048
  widths: tuple[int, int] = (512, 64)

  @property
  def shape(self) -> str:
    return f'{self.name} T{self.queries} S{self.keys} H{self.heads} k{self.slots}'

  @property
  def pairs(self) -> float:
    place = np.arange(self.keys - self.queries, self.keys) + 1
    return float(np.minimum(place, self.slots).sum())

  @property
  def scale(self) -> float:
    return sum(self.widths) ** -0.5

  def flops(self, work: str) -> float:
    V, C = self.widths
    return self.heads * self.pairs * 2 * {'fwd': 2 * V + C, 'bwd': 5 * V + 3 * C}[work]


BARS = tuple(Case('bar', 4096, 16384, heads) for heads in (128, 64, 16))
LENGTHS = tuple(Case('length', 1024 * n, 1024 * n, 16) for n in (4, 16, 64, 128))
STEP = Case('step', 16384, 131072, 128)


def run(only: str = '') -> Iterator[list[table.Row]]:
  if jax.default_backend() != 'gpu':
    yield run_case(Case('tiny', 16, 32, 8, 8, (16, 8)))
    return
  for case in BARS + LENGTHS:
    if only in case.shape:
      yield run_case(case)
  if only in STEP.shape:
    yield run_step(STEP)


@functools.partial(jax.jit, static_argnums=0)
def data(case: Case):
  """q, its rope part, latents, their rope part, index, count and do."""
  T, S, H, K, (V, C) = case.queries, case.keys, case.heads, case.slots, case.widths
  keys = jax.random.split(jax.random.key(0), 6)
  draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
  end_T1 = (jnp.arange(S - T, S, dtype=jnp.int32) + 1)[:, None]
  # one random place in each of K equal parts of what is before the query; all, where that is less
  slot_K = jnp.arange(K, dtype=jnp.int32)
  begin = lambda slot: (slot.astype(jnp.float32) * (end_T1 / K)).astype(jnp.int32)
  width_TK = jnp.maximum(begin(slot_K + 1) - begin(slot_K), 1)
  chance_TK = jax.random.uniform(keys[5], (T, K))
  random_TK = begin(slot_K) + (chance_TK * width_TK).astype(jnp.int32)
  index_TK = jnp.where(end_T1 > K, jnp.minimum(random_TK, end_T1 - 1), slot_K)
  count_T = jnp.minimum(end_T1[:, 0], K)
  index_TK = jnp.where(slot_K < count_T[:, None], index_TK, 0)
  q, q_rope = draw(keys[0], T, H, V), draw(keys[1], T, H, C)
  latents = draw(keys[2], S, V), draw(keys[3], S, C)
  return q, q_rope, *latents, index_TK, count_T, draw(keys[4], T, H, V)


def forward(case: Case) -> Callable:
  return functools.partial(sparse_mla, scale=case.scale)


def backward(case: Case) -> Callable:
  """From what the forward pass keeps."""
  if jax.default_backend() != 'gpu':

    def pull(q, q_rope, latent, rope, index, count, do, o, lse):
      call = lambda *a: forward(case)(*a, index_TK=index, count_T=count)
      _, vjp = jax.vjp(call, q, q_rope, latent, rope)
      return vjp((do, jnp.zeros_like(lse)))

    return pull

  def kernels(q, q_rope, latent, rope, index, count, do, o, lse):
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1)
    keys = Keys(latent, rope, index, count)
    return mosaic.backward(q, q_rope, keys, lse, delta, do, scale=case.scale)

  return kernels


def run_case(case: Case) -> list[table.Row]:
  *operands, do = data(case)
  T, H, (V, _) = case.queries, case.heads, case.widths
  kept = jnp.zeros((T, H, V), do.dtype), jnp.zeros((T, H), jnp.float32)
  calls = [(forward(case), tuple(operands)), (backward(case), (*operands, do, *kept))]
  dense = case.name == 'length'
  if dense:
    calls += dense_calls(case.keys, H)
  compiled = timing.compile_all(calls)
  kept = compiled[0](*operands)
  args: list[Any] = [tuple(operands), (*operands, do, *kept)]
  error = errors(case, operands, do) if case.name == 'bar' else None
  rows = []
  for work, call, arg in zip(('fwd', 'bwd'), compiled, args, strict=False):
    measured = timing.measure(call, [arg], block=jax.block_until_ready, repeats=5)
    rows.append(
      table.row_of(
        measured, amount=case.flops(work), limit=LIMIT, unit='TFLOP/s', work=work, by='sparse',
        shape=case.shape, error=error, gigabytes=gigabytes(case, work, operands[4]),
        peak_gib=timing.peak_gib(call), length=case.keys if dense else None,
      )
    )  # fmt: skip
  return rows + (dense_rows(case.keys, H, compiled[2:]) if dense else [])


def errors(case: Case, operands: list[jax.Array], do: jax.Array) -> float:
  """The largest relative error of outputs and gradients, of four queries."""
  some = np.linspace(0, case.queries - 1, 4).astype(int)
  q, q_rope, latent, rope, index, count = operands
  cut = q[some], q_rope[some], latent, rope
  wide = lambda arrays: tuple(a.astype(jnp.float32) for a in arrays)

  def all_of(cut, do, implementation):
    call = functools.partial(
      sparse_mla, index_TK=index[some], count_T=count[some], scale=case.scale,
      implementation=implementation,
    )  # fmt: skip
    (o, lse), pull = jax.vjp(lambda *a: call(*a), *cut)
    return o, *pull((do, jnp.zeros_like(lse)))

  with jax.default_matmul_precision('highest'):
    exact = jax.jit(all_of, static_argnums=2)(wide(cut), do[some].astype(jnp.float32), 'xla')
  got = jax.jit(all_of, static_argnums=2)(cut, do[some], None)
  norm = lambda a: float(jnp.linalg.norm(a.astype(jnp.float32).ravel()))
  return max(norm(a.astype(jnp.float32) - b) / norm(b) for a, b in zip(got, exact, strict=True))


def gigabytes(case: Case, work: str, index_TK: jax.Array) -> float:
  """Counted bytes of device memory, as the text above says."""
  T, H, (V, C) = case.queries, case.heads, case.widths
  width, lse = 2 * (V + C), 4 * T * H
  gathered = distinct(case, index_TK) * width
  q, o = T * H * width, T * H * 2 * V
  if work == 'fwd':
    return (q + o + lse + gathered) / 1e9
  pairs = T * case.slots
  # p and ds written, ds read again, both read again; rows of pairs written, and read
  between = pairs * (H * 2 * (2 + 1 + 2) + 2 * width)
  latents = case.keys * (V + C) * 4 * 2
  return (2 * q + 2 * o + 2 * lse + o + 2 * gathered + between + q + latents) / 1e9


def distinct(case: Case, index_TK: jax.Array) -> int:
  """Latents that the queries in flight name, summed over all that are in flight in turn."""
  flight = _SMS // max(1, case.heads // HEADS)
  T = case.queries // flight * flight or case.queries
  rows = index_TK[:T].reshape(-1, min(flight, T) * case.slots)
  count = lambda row: jnp.zeros((case.keys,), bool).at[row].set(True).sum()
  return int(np.asarray(jax.jit(lambda rows: jax.lax.map(count, rows))(rows), np.int64).sum())


def dense_calls(length: int, heads: int) -> list[tuple[Callable, tuple]]:
  """Dense MLA attention, forward, and forward with backward."""
  keys = jax.random.split(jax.random.key(1), 4)
  draw = lambda key, width: jax.random.normal(key, (1, length, heads, width), jnp.bfloat16)
  q, k, v, do = (draw(key, width) for key, width in zip(keys, (192, 192, 128, 128), strict=True))
  segment, start = jnp.zeros((1, length), jnp.int32), jnp.zeros((1,), jnp.int32)

  def fwd(q, k, v):
    return attention(q, k, v, segment, segment, start, scale=192**-0.5)

  def both(q, k, v, do):
    return jax.vjp(fwd, q, k, v)[1](do)

  return [(fwd, (q, k, v)), (both, (q, k, v, do))]


def dense_rows(length: int, heads: int, compiled: list) -> list[table.Row]:
  """`fwd`, and `bwd` as the difference of both passes and the forward one."""
  calls, pairs = dense_calls(length, heads), length * (length + 1) / 2 * heads
  times = [
    timing.measure(call, [args], block=jax.block_until_ready, repeats=3, repeat_s=0.0)
    for call, (_, args) in zip(compiled, calls, strict=True)
  ]
  bwd = timing.Timing(times[1].median_s - times[0].median_s, times[1].spread)
  operand = length * heads * 2
  bytes_of = {'fwd': operand * (2 * 192 + 2 * 128), 'bwd': operand * (7 * 192 + 8 * 128)}
  rows = []
  for work, measured, flops in (('fwd', times[0], 640), ('bwd', bwd, 2 * (3 * 192 + 2 * 128))):
    rows.append(
      table.row_of(
        measured, amount=flops * pairs, limit=LIMIT, unit='TFLOP/s', work=work, by='dense',
        shape=f'S{length} H{heads} 192/128', gigabytes=bytes_of[work] / 1e9,
        peak_gib=timing.peak_gib(compiled[work == 'bwd']), length=length,
      )
    )  # fmt: skip
  return rows


def run_step(case: Case) -> list[table.Row]:
  """Every part of V3.2's attention in a training step, and both passes of dense attention."""
  *operands, do = data(case)
  T, S, H, (V, _) = case.queries, case.keys, case.heads, case.widths
  ratio = S // T
  J, I = 64, 128
  keys = jax.random.split(jax.random.key(2), 3)
  index_q = jax.random.normal(keys[0], (S, J, I), jnp.bfloat16)
  index_k = jax.random.normal(keys[1], (S, I), jnp.bfloat16)
  weight = jax.random.normal(keys[2], (S, J), jnp.float32) * (J * I) ** -0.5
  first, end = jnp.zeros((S,), jnp.int32), jnp.arange(1, S + 1, dtype=jnp.int32)
  index = operands[4]

  def learn(index_q, index_k, weight, q, q_rope, latent, rope, index, count, lse):
    mass = key_mass(q, q_rope, latent, rope, index, count, lse, scale=case.scale)
    share = jnp.full((T,), 1 / S)

    def call(index_q, index_k, weight):
      return sparse_index_loss(index_q, index_k, weight, index, count, mass / H, share)

    return jax.value_and_grad(call, (0, 1, 2))(index_q, index_k, weight)

  kept = jnp.zeros((T, H, V), do.dtype), jnp.zeros((T, H), jnp.float32)
  select = functools.partial(select_keys, k=case.slots, fp8=True)
  parts: dict[str, tuple] = {
    'choice of keys, float8': (select, (index_q, index_k, weight, first, end)),
    'attention': (forward(case), tuple(operands)),
    "indexer's loss": (learn, (index_q[-T:], index_k, weight[-T:], *operands, kept[1])),
    'backward': (backward(case), (*operands, do, *kept)),
  }
  compiled = timing.compile_all([*parts.values(), *dense_calls(S, H // ratio)])
  kept = compiled[1](*operands)
  total, rows, counted = 0.0, [], 0.0
  for (work, (_, args)), call in zip(parts.items(), compiled, strict=False):
    times = 1 if work.startswith('choice') else ratio
    if work == 'backward':
      args = (*operands, do, *kept)
    if 'loss' in work:
      args = (*args[:-1], kept[1])
    measured = timing.measure(call, [args], block=jax.block_until_ready, repeats=2, repeat_s=0.0)
    bytes_ = {
      'attention': lambda: gigabytes(case, 'fwd', index),
      'backward': lambda: gigabytes(case, 'bwd', index),
      "indexer's loss": lambda: _loss_gigabytes(case, index, J, I),
    }.get(work, lambda: (4 * S * (S + 1) + S * (J * I + 4 * case.slots)) / 1e9)() * times
    total, counted = total + measured.median_s * times, counted + bytes_
    rows.append(
      _step_row(work, 'sparse', measured.median_s * times, measured.spread, bytes_, S, call)
    )
  del operands, do, kept, parts
  dense = dense_rows(S, H // ratio, compiled[len(rows) :])
  dense_s, dense_bytes = (sum(getattr(r, n) for r in dense) * ratio for n in ('ms', 'gigabytes'))
  rows.append(_step_row('all', 'sparse', total, 0.0, counted, S, None))
  rows.append(_step_row('all', 'dense', dense_s / 1e3, 0.0, dense_bytes, S, None))
  note = (
    f'{total * 1e3 / dense_s:.0%} of the time, {counted / dense_bytes:.0%} of the bytes of dense'
  )
  return [*dense, *rows[:-2], dataclasses.replace(rows[-2], note=note), rows[-1]]


def _loss_gigabytes(case: Case, index_TK: jax.Array, J: int, I: int) -> float:
  """Latents gathered; each pair's row written and read, its key and target read twice."""
  V, C = case.widths
  pairs = case.queries * case.slots
  q = case.queries * case.heads * 2 * (V + C)
  latents = distinct(case, index_TK) * 2 * (V + C)
  index_q = case.queries * J * I * 2 * 2
  return (q + index_q + latents + pairs * (2 * 2 * I + 16)) / 1e9


def _step_row(work, by, seconds, spread, bytes_, length, call) -> table.Row:
  return table.row_of(
    timing.Timing(seconds, spread), amount=bytes_ * 1e9, limit=3000.0, unit='GB/s',
    work=f'step: {work}', by=by, shape=f'step S{length} H128', gigabytes=bytes_,
    peak_gib=timing.peak_gib(call) if call is not None else None,
  )  # fmt: skip
