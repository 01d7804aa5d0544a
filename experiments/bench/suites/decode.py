"""One new token over a cache of MLA latents: all of it, and the places that an indexer chose.

Bytes are the cache's, once: 1152 a place, which is what bounds this with few heads; with 128 of
them it is 242 operations a byte, and the tensor cores. `xla` is `ops.attention.latent_attention`.
Errors are relative to float32 on the same inputs.
"""

# B rows  H heads  V latent (value) width  C rope width  T places  K chosen places

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import table, timing
from moe_jax.ops.decode_attention import decode_attention, sparse_decode_attention

LIMIT = 3000.0
# rows, heads, places
CASES = ((128, 128, 8192), (32, 128, 8192), (8, 128, 8192), (1, 128, 8192), (128, 16, 8192))
LONG = tuple((1, 128, 1024 * n) for n in (4, 16, 64, 128))
_K = 2048


def run(only: str = '') -> Iterator[list[table.Row]]:
  if jax.default_backend() != 'gpu':
    yield run_case(2, 8, 128, 64, 64, 32)
    return
  for case in CASES + LONG:
    if only in str(case):
      yield run_case(*case, 512, 64, _K)


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
  rows, compiled = [], timing.compile_all(calls.values())
  for (work, by), call, (_, args) in zip(calls, compiled, calls.values(), strict=True):
    places = B * (K if 'chosen' in work else T)
    wide: Any = [a[:1].astype(jnp.float32) for a in operands]
    if 'chosen' in work:
      chosen = dict(index_BSK=place[:1], count_BS=count[:1])
      exact = sparse_decode_attention(*wide, **chosen, scale=scale)
    else:
      exact = dense(*wide, start_B=start[:1], implementation='reference')
    got = call(*args)[:1].astype(jnp.float32)
    error = float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact))
    measured = timing.measure(call, [args], block=jax.block_until_ready)
    flops = 2 * places * H * (2 * V + C) / measured.median_s / 1e12
    rows.append(
      table.row_of(
        measured, amount=places * 2 * (V + C), limit=LIMIT, unit='GB/s', work=work, by=by,
        shape=f'B{B} H{H} T{T} {V}+{C} k{K}', error=error, note=f'{flops:.0f} TFLOP/s',
        gigabytes=places * 2 * (V + C) / 1e9, peak_gib=timing.peak_gib(call),
        length=T if B == 1 else None,
      )
    )  # fmt: skip
  return rows
