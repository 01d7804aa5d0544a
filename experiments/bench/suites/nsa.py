"""Native sparse attention and mixture of block attention in bfloat16, beside dense attention.

64 query heads share 4 key-value heads of width 128. `nsa`: blocks of 32 tokens every 16 are
compressed, 16 blocks of 64 are chosen, the window is 512. `moba`: 3 blocks of 512 are chosen
besides the query's own. Keys are made already: projections and the compressing network are not part
of it. `bwd` is both passes less the forward one. `dense` is causal attention of 16 query heads on
one key-value head, times 4.

Operations are those of pairs that a query sees, 4 C forward and 10 C backward, and 2 C more for the
importance of compressed blocks. Bytes are counted: every operand and result once, backward twice.
Errors are relative to the masks of all pairs in float32, on 2500 tokens of two documents.
"""

# S sequence  G key-value heads  M query heads of each  C width

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from experiments.bench.suites.grouped_matmul import LIMIT
from experiments.bench.suites.v4_attention import LENGTHS, less, peak
from moe_jax.ops import attention as dense_op
from moe_jax.ops import moba, nsa
from moe_jax.ops.blocks import Span

SIZES = nsa.Sizes(compress_length=32, stride=16, select_length=64, top_blocks=16, window=512)
# of MoBA: 3 blocks of 512 besides the query's own
_BLOCK, _TOP_K = 512, 3


@dataclasses.dataclass(frozen=True)
class Case:
  kind: str
  length: int
  groups: int = 4
  heads: int = 16  # of each group
  width: int = 128
  documents: tuple[int, ...] = ()

  @property
  def shape(self) -> str:
    return f'{self.kind} S{self.length} H{self.groups * self.heads}/{self.groups}'

  def pairs(self) -> tuple[int, int, int]:
    """Of queries with compressed blocks, tokens of chosen blocks, and of their window or block."""
    position = np.arange(self.length, dtype=np.int64)
    if self.kind == 'moba':
      chosen = np.minimum(position // _BLOCK, _TOP_K) * _BLOCK
      return 0, int(chosen.sum()), int((position % _BLOCK + 1).sum())
    s = SIZES
    compressed = np.maximum((position - s.compress_length + 1) // s.stride + 1, 0)
    chosen = np.minimum(position // s.select_length, s.top_blocks - 1) * s.select_length
    chosen += position % s.select_length + 1
    near = np.minimum(position + 1, s.window)
    return int(compressed.sum()), int(chosen.sum()), int(near.sum())

  def places(self) -> tuple[jax.Array, jax.Array]:
    lengths = self.documents or (self.length,)
    position = np.concatenate([np.arange(n) for n in lengths])
    segment = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return jnp.asarray(position[None], jnp.int32), jnp.asarray(segment[None], jnp.int32)


def run(only: str = '') -> Iterator[list[table.Row]]:
  if jax.default_backend() != 'gpu':
    return
  cases = [Case(kind, length) for length in LENGTHS for kind in ('nsa', 'moba')]
  cases = [case for case in cases if only in case.shape]
  kinds = list(dict.fromkeys(case.kind for case in cases))
  programs = iter(
    timing.compile_all(
      [c for kind in kinds for c in error_calls(kind)]
      + [c for case in cases for c in calls(case)]
      + [c for case in cases if case.kind == 'nsa' for c in dense_calls(case)]
    )
  )
  three = lambda: list(itertools.islice(programs, 3))
  error = {kind: errors(kind, three()) for kind in kinds}
  for case in cases:
    yield run_case(case, three(), error[case.kind])
  for case in cases:
    if case.kind == 'nsa':
      yield dense(case, three())


def operands(case: Case) -> tuple[jax.Array, ...]:
  """q, keys and values of the branches, compressed at every token, and gates; then do."""
  keys = jax.random.split(jax.random.key(0), 9)
  S, G, M, C = case.length, case.groups, case.heads, case.width
  draw = lambda i, *shape: jax.random.normal(keys[i], (1, S, G, *shape), jnp.bfloat16)
  kv = (draw(i, C) for i in range(1, 7))
  return draw(0, M, C), *kv, jax.nn.sigmoid(draw(7, M, 3)), draw(8, M, C)


def with_backward(fn: Callable) -> Callable:
  """fn, and its gradients in all arguments but the first, places, and the last, do."""

  def call(places, *args):
    o, pull = jax.vjp(functools.partial(fn, places), *args[:-1])
    return o, pull(args[-1])

  return call


def calls(case: Case) -> list[tuple[Callable, tuple]]:
  """Programs to make the operands, to go forward, and to go back too, which takes do as well."""
  make, forward = functools.partial(operands, case), functools.partial(attend, case.kind)
  # places are an argument: of constants, XLA would compute ahead for half a minute
  args = (case.places(), *jax.eval_shape(make))
  return [(make, ()), (forward, args[:-1]), (with_backward(forward), args)]


def attend(kind, places, q, *kv_and_gate) -> jax.Array:
  (position, segment), (*kv, gate) = places, kv_and_gate
  if kind == 'moba':
    sizes = {'block': _BLOCK, 'top_k': _TOP_K, 'scale': q.shape[-1] ** -0.5}
    return moba.rows_attention(q, kv[2], kv[3], position, segment, **sizes)
  end_1N, _ = nsa.closed_blocks(position, segment, SIZES)
  compressed = nsa.KeyValue(kv[0][:, end_1N[0]], kv[1][:, end_1N[0]])
  selected, window = nsa.KeyValue(kv[2], kv[3]), nsa.KeyValue(kv[4], kv[5])
  scale = q.shape[-1] ** -0.5
  return nsa.rows_attention(
    q, compressed, selected, window, gate, position, segment, sizes=SIZES, scale=scale
  )


def by_masks(kind, places, q, *kv_and_gate) -> jax.Array:
  (position, segment), (*kv, gate) = places, kv_and_gate
  span = Span(segment, position, segment, position, jnp.zeros(1, jnp.int32))
  if kind == 'moba':
    sizes = {'block': _BLOCK, 'top_k': _TOP_K, 'scale': q.shape[-1] ** -0.5}
    with jax.default_matmul_precision('highest'):
      return moba.attention(q, kv[2], kv[3], span, **sizes)
  compressed, selected, window = (nsa.KeyValue(kv[i], kv[i + 1]) for i in (0, 2, 4))
  with jax.default_matmul_precision('highest'):
    return nsa.attention(
      q, compressed, selected, window, gate, span, sizes=SIZES, scale=q.shape[-1] ** -0.5
    )


def run_case(
  case: Case, programs: Sequence[jax.stages.Compiled], error: dict[str, float]
) -> list[table.Row]:
  make, forward, both = programs
  *args, do = make()
  places = case.places()
  C, heads, pairs = case.width, case.groups * case.heads, case.pairs()
  flops = {'fwd': 4 * sum(pairs) + 2 * pairs[0], 'bwd': 10 * sum(pairs)}
  # MoBA has one pair of keys and values and no gates
  read = args if case.kind == 'nsa' else args[:3]
  moved = sum(a.nbytes for a in read) + do.nbytes
  time = lambda call, *at: timing.measure(call, [at], block=jax.block_until_ready, repeats=5)
  measured = {'fwd': time(forward, places, *args), 'bwd': time(both, places, *args, do)}
  measured['bwd'] = less(measured['bwd'], measured['fwd'])
  return [
    table.row_of(
      measured[work], amount=flops[work] * C * heads, limit=LIMIT, unit='TFLOP/s', work=work,
      by=case.kind, shape=case.shape, error=error[work], length=case.length,
      gigabytes=moved * passes / 1e9, peak_gib=peak(forward if passes == 1 else both),
    )
    for work, passes in (('fwd', 1), ('bwd', 2))
  ]  # fmt: skip


def dense_operands(case: Case) -> tuple[jax.Array, ...]:
  """q, k, v and do of one group."""
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, heads: jax.random.normal(
    key, (1, case.length, heads, case.width), jnp.bfloat16
  )
  M = case.heads
  q, k, v, do = (draw(key, heads) for key, heads in zip(keys, (M, 1, 1, M), strict=True))
  return q, k, v, do


def dense_calls(case: Case) -> list[tuple[Callable, tuple]]:
  def forward(segment, q, k, v):
    start = jnp.zeros(1, jnp.int32)
    return dense_op.attention(q, k, v, segment, segment, start, scale=case.width**-0.5)

  make, segment = functools.partial(dense_operands, case), case.places()[1]
  args = (segment, *jax.eval_shape(make))
  return [(make, ()), (forward, args[:-1]), (with_backward(forward), args)]


def dense(case: Case, programs: Sequence[jax.stages.Compiled]) -> list[table.Row]:
  """Causal attention of one group, times the groups."""
  S, M, C, times = case.length, case.heads, case.width, case.groups
  make, forward, both = programs
  q, k, v, do = make()
  moved = (2 * q.nbytes + k.nbytes + v.nbytes) * times / 1e9
  time = lambda call, *at: timing.measure(call, [at], block=jax.block_until_ready, repeats=3)
  segment = case.places()[1]
  measured = {'fwd': time(forward, segment, q, k, v), 'bwd': time(both, segment, q, k, v, do)}
  measured['bwd'] = less(measured['bwd'], measured['fwd'])
  return [
    table.row_of(
      timing.Timing(measured[work].median_s * times, measured[work].spread),
      amount=factor * C * M * times * S * (S + 1) / 2, limit=LIMIT, unit='TFLOP/s', work=work,
      by='dense', shape=case.shape, gigabytes=moved * passes, length=S,
      note=f'one group times {times}',
    )
    for work, factor, passes in (('fwd', 4, 1), ('bwd', 10, 2))
  ]  # fmt: skip


def error_calls(kind: str) -> list[tuple[Callable, tuple]]:
  """Operands of a small case, and both ways with their gradients."""
  case = checked(kind)
  make, places = functools.partial(operands, case), case.places()
  args = jax.eval_shape(make)
  wide = jax.eval_shape(lambda: jax.tree.map(lambda a: a.astype(jnp.float32), make()))
  by = lambda fn: with_backward(functools.partial(fn, kind))
  return [(make, ()), (by(attend), (places, *args)), (by(by_masks), (places, *wide))]


def checked(kind: str) -> Case:
  return Case(kind, 2500, groups=1, documents=(1500, 1000))


def errors(kind: str, programs: Sequence[jax.stages.Compiled]) -> dict[str, float]:
  """Of o, and the largest of all gradients, by norm."""
  make, kernels, masks = programs
  args, places = make(), checked(kind).places()
  got_o, got = kernels(places, *args)
  want_o, want = masks(places, *(a.astype(jnp.float32) for a in args))
  norm = lambda a: float(jnp.linalg.norm(a.astype(jnp.float32)))
  error = lambda a, b: norm(a.astype(jnp.float32) - b) / norm(b)
  return {
    'fwd': error(got_o, want_o),
    # MoBA reads no gates and one pair of keys and values
    'bwd': max(error(a, b) for a, b in zip(got, want, strict=True) if norm(b) > 0),
  }
