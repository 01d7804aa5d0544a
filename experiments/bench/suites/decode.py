"""One new token over a cache: MLA's latents, all or those that an indexer chose, and V4's caches.

Bytes are those of the cache that a token sees, once: 1152 a place of MLA's, which is what bounds
this with few heads; with 128 of them it is 242 operations a byte, and the tensor cores. `xla` is
`ops.attention.latent_attention`. Errors are relative to float32 on the same inputs.
"""

# B rows  H heads  V latent (value) width  C rope width  T places  K chosen places

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import table, timing
from moe_jax.ops.decode_attention import (
  compressed_decode_attention,
  decode_attention,
  sparse_decode_attention,
)
from moe_jax.ops.sink_attention import Spans

LIMIT = 3000.0
# rows, heads, places
CASES = ((128, 128, 8192), (32, 128, 8192), (8, 128, 8192), (1, 128, 8192), (128, 16, 8192))
LONG = tuple((1, 128, 1024 * n) for n in (4, 16, 64, 128))
V4 = ((128, 64, 32768), (8, 64, 32768), *((1, 64, 1024 * n) for n in (4, 32, 128)))
_K = 2048


def run(only: str = '') -> Iterator[list[table.Row]]:
  if jax.default_backend() != 'gpu':
    yield run_case(2, 8, 128, 64, 64, 32) + run_v4(2, 4, 256, 32, 16, 8)
    return
  for case in CASES + LONG:
    if only in str(case):
      yield run_case(*case, 512, 64, _K)
  for case in V4:
    if only in f'v4 {case}':
      yield run_v4(*case, 512, 128, 512)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def data(B: int, H: int, T: int, V: int, C: int, K: int):
  """q, its rope part, latents, their rope part, and K places of each row in ascending order."""
  keys = jax.random.split(jax.random.key(0), 5)
  draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
  stride = T // K
  place_B1K = jnp.arange(K) * stride + jax.random.randint(keys[4], (B, 1, K), 0, stride)
  q, q_rope = draw(keys[0], B, 1, H, V), draw(keys[1], B, 1, H, C)
  return q, q_rope, draw(keys[2], B, T, V), draw(keys[3], B, T, C), place_B1K.astype(jnp.int32)


def run_case(B: int, H: int, T: int, V: int, C: int, K: int) -> list[table.Row]:
  q, q_rope, latent, rope, place = data(B, H, T, V, C, K)
  start, count = jnp.full((B,), T - 1, jnp.int32), jnp.full((B, 1), K, jnp.int32)
  scale = (V + C) ** -0.5
  dense = functools.partial(decode_attention, scale=scale)
  operands = q, q_rope, latent, rope
  calls = {
    ('decode', 'kernel'): (dense, (*operands, start)),
    ('decode, chosen', 'kernel'): (
      functools.partial(sparse_decode_attention, scale=scale),
      (*operands, place, count),
    ),
  }
  if B * T <= 2**18:
    reference = functools.partial(dense, implementation='reference')
    calls['decode', 'xla'] = (reference, (*operands, start))
  wide: Any = [a[:1].astype(jnp.float32) for a in operands]
  chosen = dict(index_BSK=place[:1], count_BS=count[:1])
  exact = {
    'decode': dense(*wide, start_B=start[:1], implementation='reference'),
    'decode, chosen': sparse_decode_attention(*wide, **chosen, scale=scale),
  }
  places = {'decode': B * T, 'decode, chosen': B * K}
  shape = dict(shape=f'B{B} H{H} T{T} {V}+{C} k{K}', length=T if B == 1 else None)
  return _rows(calls, exact, places, 2 * (V + C), 2 * H * (2 * V + C), shape)


def run_v4(B: int, H: int, T: int, C: int, window: int, top_k: int) -> list[table.Row]:
  """One token over the window and CSA's chosen entries, an entry for 4 tokens, or all of HCA's."""
  calls, exact, places = {}, {}, {}
  for work, ratio in (('v4 csa', 4), ('v4 hca', 128)):
    N, K = max(1, T // ratio), min(top_k, T // ratio)
    q, _, entry, key, place = data(B, H, N, C, C, K if work == 'v4 csa' else 1)
    key, sink = key[:, : window + 1], jnp.ones(H)
    column = lambda n: jnp.full((B, 1), n, jnp.int32)
    index, count = (place, K) if work == 'v4 csa' else (None, N)
    seen = Spans(column(1), column(key.shape[1] - 1), column(0), column(count))
    call: Any = functools.partial(compressed_decode_attention, scale=C**-0.5)
    operands = q, key, entry, sink, seen, index
    calls[work, 'kernel'] = call, operands
    if B * N <= 2**14:
      calls[work, 'masks'] = functools.partial(call, implementation='reference'), operands
    wide: Any = [a[:1].astype(jnp.float32) for a in (q, key, entry)]
    first: Any = jax.tree.map(lambda a: a[:1], (seen, index))
    exact[work] = call(*wide, sink, *first, implementation='reference')
    places[work] = B * (key.shape[1] - 1 + count)
  shape = dict(shape=f'B{B} H{H} T{T} {C} k{top_k}', length=T if B == 1 else None)
  return _rows(calls, exact, places, 2 * C, 4 * H * C, shape)


def _rows(
  calls: dict[tuple[str, str], tuple],
  exact: dict[str, jax.Array],
  places: dict[str, int],
  bytes_a_place: int,
  flops_a_place: int,
  names: dict[str, Any],
) -> list[table.Row]:
  rows, compiled = [], timing.compile_all(calls.values())
  for (work, by), call, (_, args) in zip(calls, compiled, calls.values(), strict=True):
    got = call(*args)[:1].astype(jnp.float32)
    error = float(jnp.linalg.norm(got - exact[work]) / jnp.linalg.norm(exact[work]))
    measured = timing.measure(call, [args], block=jax.block_until_ready)
    size, flops = places[work] * bytes_a_place, places[work] * flops_a_place
    rows.append(
      table.row_of(
        measured, amount=size, limit=LIMIT, unit='GB/s', work=work, by=by, error=error,
        note=f'{flops / measured.median_s / 1e12:.0f} TFLOP/s', gigabytes=size / 1e9,
        peak_gib=timing.peak_gib(call), **names,
      )
    )  # fmt: skip
  return rows
