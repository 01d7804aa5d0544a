"""Native sparse attention in bfloat16, all branches, beside dense attention of the same heads.

64 query heads share 4 key-value heads of width 128; blocks of 32 tokens every 16 are compressed, 16
blocks of 64 are chosen, the window is 512. Keys are made already: projections and the compressing
network are not part of it. `bwd` is both passes less the forward one. `dense` is causal attention
of 16 query heads on one key-value head, times 4.

Operations are those of pairs that a query sees, 4 C forward and 10 C backward, and 2 C more for the
importance of compressed blocks. Bytes are counted: every operand and result once, backward twice.
Errors are relative to the masks of all pairs in float32, on 1100 tokens of two documents.
"""

# S sequence  G key-value heads  M query heads of each  C width

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from experiments.bench.suites.grouped_matmul import LIMIT
from experiments.bench.suites.v4_attention import LENGTHS, less, peak
from moe_jax.ops import attention as dense_op
from moe_jax.ops import nsa
from moe_jax.ops.blocks import Span

SIZES = nsa.Sizes(compress_length=32, stride=16, select_length=64, top_blocks=16, window=512)


@dataclasses.dataclass(frozen=True)
class Case:
  length: int
  groups: int = 4
  heads: int = 16  # of each group
  width: int = 128
  documents: tuple[int, ...] = ()

  @property
  def shape(self) -> str:
    return f'nsa S{self.length} H{self.groups * self.heads}/{self.groups}'

  def pairs(self) -> tuple[int, int, int]:
    """Of a compressed block, a chosen block's token and a window's token with a query."""
    position = np.arange(self.length, dtype=np.int64)
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
  error = errors()
  for case in map(Case, LENGTHS):
    if only in case.shape:
      yield run_case(case, error) + dense(case)


def operands(case: Case) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """q, keys and values of the branches, compressed at every token, and gates; then do."""
  keys = jax.random.split(jax.random.key(0), 9)
  S, G, M, C = case.length, case.groups, case.heads, case.width
  draw = lambda i, *shape: jax.random.normal(keys[i], (1, S, G, *shape), jnp.bfloat16)
  kv = (draw(i, C) for i in range(1, 7))
  return (draw(0, M, C), *kv, jax.nn.sigmoid(draw(7, M, 3))), draw(8, M, C)


def attend(position, segment, q, *kv_and_gate) -> jax.Array:
  *kv, gate = kv_and_gate
  end_1N, _ = nsa.closed_blocks(position, segment, SIZES)
  compressed = nsa.KeyValue(kv[0][:, end_1N[0]], kv[1][:, end_1N[0]])
  selected, window = nsa.KeyValue(kv[2], kv[3]), nsa.KeyValue(kv[4], kv[5])
  scale = q.shape[-1] ** -0.5
  return nsa.rows_attention(
    q, compressed, selected, window, gate, position, segment, sizes=SIZES, scale=scale
  )


def by_masks(position, segment, q, *kv_and_gate) -> jax.Array:
  *kv, gate = kv_and_gate
  span = Span(segment, position, segment, position, jnp.zeros(1, jnp.int32))
  compressed, selected, window = (nsa.KeyValue(kv[i], kv[i + 1]) for i in (0, 2, 4))
  with jax.default_matmul_precision('highest'):
    return nsa.attention(
      q, compressed, selected, window, gate, span, sizes=SIZES, scale=q.shape[-1] ** -0.5
    )


def run_case(case: Case, error: dict[str, float]) -> list[table.Row]:
  places, (args, do) = case.places(), operands(case)

  def with_backward(do, *args):
    o, pull = jax.vjp(lambda *a: attend(*places, *a), *args)
    return o, pull(do)

  forward = jax.jit(lambda *args: attend(*places, *args)).lower(*args).compile()
  both = jax.jit(with_backward).lower(do, *args).compile()
  C, heads, pairs = case.width, case.groups * case.heads, case.pairs()
  flops = {'fwd': 4 * sum(pairs) + 2 * pairs[0], 'bwd': 10 * sum(pairs)}
  moved = sum(a.nbytes for a in args) + do.nbytes
  time = lambda call, *at: timing.measure(call, [at], block=jax.block_until_ready, repeats=5)
  measured = {'fwd': time(forward, *args), 'bwd': time(both, do, *args)}
  measured['bwd'] = less(measured['bwd'], measured['fwd'])
  return [
    table.row_of(
      measured[work], amount=flops[work] * C * heads, limit=LIMIT, unit='TFLOP/s', work=work,
      by='nsa', shape=case.shape, error=error[work], length=case.length,
      gigabytes=moved * passes / 1e9, peak_gib=peak(forward if passes == 1 else both),
    )
    for work, passes in (('fwd', 1), ('bwd', 2))
  ]  # fmt: skip


def dense(case: Case) -> list[table.Row]:
  """Causal attention of one group, times the groups."""
  S, M, C, times = case.length, case.heads, case.width, case.groups
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, heads: jax.random.normal(key, (1, S, heads, C), jnp.bfloat16)
  q, k, v, do = (draw(key, heads) for key, heads in zip(keys, (M, 1, 1, M), strict=True))
  segment, start = jnp.zeros((1, S), jnp.int32), jnp.zeros(1, jnp.int32)
  call = lambda q, k, v: dense_op.attention(q, k, v, segment, segment, start, scale=C**-0.5)
  forward = jax.jit(call).lower(q, k, v).compile()
  pull = jax.jit(lambda *qkv: jax.vjp(call, *qkv)[1])(q, k, v)
  backward = jax.jit(lambda pull, do: pull(do)).lower(pull, do).compile()
  moved = (2 * q.nbytes + k.nbytes + v.nbytes) * times / 1e9
  rows = []
  for work, call, at, factor in (('fwd', forward, (q, k, v), 4), ('bwd', backward, (pull, do), 10)):
    measured = timing.measure(call, [at], block=jax.block_until_ready, repeats=3)
    whole = timing.Timing(measured.median_s * times, measured.spread)
    amount = factor * C * M * times * S * (S + 1) / 2
    rows.append(
      table.row_of(
        whole, amount=amount, limit=LIMIT, unit='TFLOP/s', work=work, by='dense',
        shape=case.shape, gigabytes=moved * (1 if work == 'fwd' else 2), length=S,
        note=f'one group times {times}',
      )
    )  # fmt: skip
  return rows


def errors() -> dict[str, float]:
  """Of o, and the largest of all gradients, by norm."""
  case = Case(1100, groups=2, documents=(700, 400))
  places, (args, do) = case.places(), operands(case)
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), (args, do))

  def values(fn):
    def call(args, do):
      o, pull = jax.vjp(lambda *a: fn(*places, *a), *args)
      return o, pull(do)

    return jax.jit(call)

  got_o, got = values(attend)(args, do)
  want_o, want = values(by_masks)(*wide)
  norm = lambda a: float(jnp.linalg.norm(a.astype(jnp.float32)))
  error = lambda a, b: norm(a.astype(jnp.float32) - b) / norm(b)
  return {
    'fwd': error(got_o, want_o),
    'bwd': max(error(a, b) for a, b in zip(got, want, strict=True)),
  }
