"""DeepSeek-V4's attention in bfloat16, forward and backward, beside dense MLA of as many heads.

A layer of V4-Flash: 64 heads of 512, a window of 128 tokens, and of every 4 tokens an entry, of
which a query reads 512 (`csa`), or of every 128 one, all of them (`hca`); once with 128 heads.
Projections, compressor and indexer are not part of it. `bwd` is both passes less the forward one.
`mla` is dense causal attention, widths 192/128, measured with 4 heads and multiplied.

Operations are those of pairs of a query and a key that it sees: 4 C a pair forward, 10 C backward.
Bytes are counted: every operand and result once, and backward what each query adds to its rows,
written and read. A note says what keys are read, from L2 or beyond it. Errors are of the last 128
queries and of the rows that only they see, relative to float64.
"""

# S sequence  N entries  H heads  C width  K chosen entries

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from experiments.bench.suites.grouped_matmul import LIMIT
from moe_jax.ops import attention as dense_op
from moe_jax.ops import sink_attention as op

_KIB, _DENSE_HEADS, _CHECKED, _CHECKED_LENGTH = 1024, 4, 128, 16 * 1024
_PARTS = 16
LENGTHS = (64 * _KIB, 128 * _KIB, 4 * _KIB)
# of 128 heads: the length whose gradients fit beside their operands
_MANY_HEADS_LENGTH = 64 * _KIB


@dataclasses.dataclass(frozen=True)
class Case:
  kind: str
  length: int
  heads: int = 64
  width: int = 512
  window: int = 128
  chosen: int = 512

  @property
  def shape(self) -> str:
    return f'{self.kind} S{self.length} H{self.heads}'

  @property
  def plotted(self) -> int | None:
    """The length, of rows that are drawn against it: those of one number of heads."""
    return self.length if self.heads == Case.heads else None

  @property
  def ratio(self) -> int:
    return 4 if self.kind == 'csa' else 128

  def may_see(self) -> op.Spans:
    position_1S = jnp.arange(self.length, dtype=jnp.int32)[None]
    return op.spans(position_1S, jnp.ones_like(position_1S), window=self.window, ratio=self.ratio)

  def seen(self) -> op.Spans:
    seen = self.may_see()
    if self.kind == 'csa':
      seen = seen._replace(entry_count_BS=jnp.minimum(seen.entry_count_BS, self.chosen))
    return seen

  def index(self) -> jax.Array | None:
    """Distinct entries of those that a query may see: evenly spread, from a random one on."""
    if self.kind != 'csa':
      return None
    visible_S1 = (jnp.arange(self.length)[:, None] + 1) // self.ratio
    slot_K = jnp.arange(self.chosen)
    shift_S1 = jax.random.randint(jax.random.key(1), (self.length, 1), 0, 1 << 30)
    spread_SK = (slot_K * visible_S1 // self.chosen + shift_S1) % jnp.maximum(visible_S1, 1)
    few_SK = jnp.minimum(slot_K, jnp.maximum(visible_S1 - 1, 0))
    return jnp.where(visible_S1 > self.chosen, spread_SK, few_SK)[None].astype(jnp.int32)

  def pairs(self) -> int:
    position = np.arange(self.length, dtype=np.int64)
    entries = (position + 1) // self.ratio
    if self.kind == 'csa':
      entries = np.minimum(entries, self.chosen)
    return int((np.minimum(position + 1, self.window) + entries).sum())


def run(only: str = '') -> Iterator[list[table.Row]]:
  if jax.default_backend() != 'gpu':
    tiny = Case('csa', 128, heads=2, width=16, window=8, chosen=16)
    yield run_case(tiny, timing.compile_all(calls(tiny)))
    return
  cases = [Case(kind, length) for length in LENGTHS for kind in ('csa', 'hca')]
  cases = [
    case for case in (*cases, Case('csa', _MANY_HEADS_LENGTH, heads=128)) if only in case.shape
  ]
  beside = [case for case in cases if case.kind == 'csa']
  of_length = {case.length: dense_calls(case) for case in beside}
  programs = timing.compile_all(
    [c for case in cases for c in calls(case)] + [c for some in of_length.values() for c in some]
  )
  for i, case in enumerate(cases):
    yield run_case(case, programs[3 * i : 3 * i + 3])
  for case in beside:
    at = 3 * (len(cases) + list(of_length).index(case.length))
    yield dense(case, programs[at : at + 3])


def data(case: Case) -> tuple:
  """q, key, entry, sink, what is seen, the index; then do."""
  keys = jax.random.split(jax.random.key(0), 5)
  S, H, C = case.length, case.heads, case.width
  shapes = (1, S, H, C), (1, S, C), (1, -(-S // case.ratio), C), (H,), (1, S, H, C)

  def draw(key, shape):
    if len(shape) < 4:
      return jax.random.normal(key, shape, jnp.bfloat16)
    # in parts: random bits and what is between take several times the memory of the numbers
    part = (shape[0], shape[1] // _PARTS, *shape[2:])
    parts = jax.lax.map(
      lambda key: jax.random.normal(key, part, jnp.bfloat16), jax.random.split(key, _PARTS)
    )
    return parts.reshape(shape)

  q, key, entry, sink, do = map(draw, keys, shapes)
  return q, key, entry, sink.astype(jnp.float32), case.seen(), case.index(), do


def calls(case: Case) -> list[tuple[Callable, tuple]]:
  """Programs to make the operands, to go forward, and to go back too, which takes do as well."""

  def forward(q, key, entry, sink, seen, index):
    o, _ = op.compressed_attention(
      q, key, entry, sink, seen, index, window=case.window, scale=case.width**-0.5
    )
    return o

  def both(q, key, entry, sink, seen, index, do):
    call = lambda q, key, entry, sink: forward(q, key, entry, sink, seen, index)
    o, pull = jax.vjp(call, q, key, entry, sink)
    return o, pull(do)

  make = functools.partial(data, case)
  args = jax.eval_shape(make)
  return [(make, ()), (forward, args[:-1]), (both, args)]


def run_case(case: Case, programs: Sequence[jax.stages.Compiled]) -> list[table.Row]:
  make, forward, both = programs
  *args, do = make()
  errors = check(case, tuple(args), do, *both(*args, do)) if case.length <= _CHECKED_LENGTH else {}
  pairs, C, index = case.pairs(), case.width, args[-1]
  inputs = sum(a.nbytes for a in args[:4]) + (0 if index is None else index.nbytes)
  # q, do, o and dq are of one size
  outputs, parts = do.nbytes, 2 * pairs * C * 2 * max(1, case.heads // 64)
  gigabytes = {'fwd': inputs + outputs, 'bwd': 2 * inputs + 2 * outputs + parts}
  time = lambda call, *at: timing.measure(call, [at], block=jax.block_until_ready, repeats=5)
  measured = {'fwd': time(forward, *args), 'bwd': time(both, *args, do)}
  measured['bwd'] = less(measured['bwd'], measured['fwd'])
  return [
    table.row_of(
      measured[work], amount=factor * C * case.heads * pairs, limit=LIMIT, unit='TFLOP/s',
      work=work, by=case.kind, shape=case.shape, error=errors.get(work), length=case.plotted,
      gigabytes=gigabytes[work] / 1e9, peak_gib=peak(forward if work == 'fwd' else both),
      note=f'{pairs * C * 2 / 1e9:.1f} GB of keys read',
    )
    for work, factor in (('fwd', 4), ('bwd', 10))
  ]  # fmt: skip


def less(both: timing.Timing, forward: timing.Timing) -> timing.Timing:
  """What the backward pass adds; its spread is that of both."""
  rest = both.median_s - forward.median_s
  return timing.Timing(rest, both.spread * both.median_s / rest)


def dense_data(case: Case) -> tuple[jax.Array, ...]:
  """q, k, v and do of a few heads of dense MLA."""
  keys = jax.random.split(jax.random.key(0), 4)
  shape = 1, case.length, _DENSE_HEADS
  draw = lambda key, width: jax.random.normal(key, (*shape, width), jnp.bfloat16)
  q, k, v, do = (draw(key, width) for key, width in zip(keys, (192, 192, 128, 128), strict=True))
  return q, k, v, do


def dense_calls(case: Case) -> list[tuple[Callable, tuple]]:
  """As `calls`, of dense MLA."""

  def forward(q, k, v):
    segment, start = jnp.zeros((1, case.length), jnp.int32), jnp.zeros(1, jnp.int32)
    return dense_op.attention(q, k, v, segment, segment, start, scale=192**-0.5)

  def both(q, k, v, do):
    o, pull = jax.vjp(forward, q, k, v)
    return o, pull(do)

  make = functools.partial(dense_data, case)
  args = jax.eval_shape(make)
  return [(make, ()), (forward, args[:-1]), (both, args)]


def dense(case: Case, programs: Sequence[jax.stages.Compiled]) -> list[table.Row]:
  """Dense MLA of as many heads and tokens: a few heads' time, times the rest."""
  S, times = case.length, case.heads // _DENSE_HEADS
  make, forward, both = programs
  q, k, v, do = make()
  pairs = S * (S + 1) // 2
  inputs, o = q.nbytes + k.nbytes + v.nbytes, do.nbytes
  gigabytes = {'fwd': inputs + o, 'bwd': 3 * inputs + 4 * o}
  time = lambda call, *at: timing.measure(call, [at], block=jax.block_until_ready, repeats=3)
  measured = {'fwd': time(forward, q, k, v), 'bwd': time(both, q, k, v, do)}
  measured['bwd'] = less(measured['bwd'], measured['fwd'])
  # a tile of 128 queries reads all keys and values before it
  read = pairs / 128 * (192 + 128) * 2 * case.heads / 1e9
  return [
    table.row_of(
      timing.Timing(measured[work].median_s * times, measured[work].spread),
      amount=width * pairs * case.heads, limit=LIMIT, unit='TFLOP/s', work=work, by='mla',
      shape=f'mla S{S} H{case.heads}', gigabytes=gigabytes[work] * times / 1e9, length=case.plotted,
      note=f'{_DENSE_HEADS} heads times {times}; {read:.0f} GB of keys read',
    )
    for work, width in (('fwd', 640), ('bwd', 1664))
  ]  # fmt: skip


def peak(compiled: jax.stages.Compiled) -> float | None:
  memory = compiled.memory_analysis()
  if memory is None:
    return None
  used = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
  return sum(used) / 2**30


def check(case: Case, args: tuple, do, got_o, got_grads) -> dict[str, float]:
  """Relative errors of o, and the largest of dq's, dkey's and dentry's."""
  *operand, sink, seen, index = args
  n, scale = min(_CHECKED, case.length), case.width**-0.5
  wide = lambda a: np.asarray(a, np.float64)
  q, do, sink = wide(operand[0][0, -n:]), wide(do[0, -n:]), wide(sink)
  key, entry = wide(operand[1][0]), wide(operand[2][0])
  o, dq, dkey, dentry = (np.zeros(a.shape) for a in (q, q, key, entry))
  first, count, entry_first, entry_count = (np.asarray(a[0, -n:]) for a in seen)
  for t in range(n):
    at, slot = first[t] + np.arange(count[t]), np.arange(entry_count[t])
    names = entry_first[t] + slot if index is None else np.asarray(index[0, t - n])[slot]
    k = np.concatenate([key[at], entry[names]])
    s = q[t] @ k.T * scale
    top = np.maximum(s.max(-1), sink)
    e = np.exp(s - top[:, None])
    p = e / (e.sum(-1) + np.exp(sink - top))[:, None]
    o[t] = p @ k
    ds = p * (do[t] @ k.T - (o[t] * do[t]).sum(-1)[:, None]) * scale
    dq[t] = ds @ k
    dk = ds.T @ q[t] + p.T @ do[t]
    np.add.at(dkey, at, dk[: count[t]])
    np.add.at(dentry, names, dk[count[t] :])
  # what only these queries see
  new = case.length // case.ratio - (case.length - n) // case.ratio
  error = lambda a, b: float(np.linalg.norm(wide(a) - b) / max(np.linalg.norm(b), 1e-30))
  errors = [error(got_grads[0][0, -n:], dq), error(got_grads[1][0, -n:], dkey[-n:])]
  if new:
    end = case.length // case.ratio
    errors.append(error(got_grads[2][0, end - new : end], dentry[end - new : end]))
  return {'fwd': error(got_o[0, -n:], o), 'bwd': max(errors)}
