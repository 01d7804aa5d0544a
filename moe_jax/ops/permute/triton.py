"""Triton kernels that copy tokens to their rows, bound by memory, and that count.

spread_rows  program: some tokens x up to 1024 columns, read once and written to each of the K rows
             of each token: T * D in, R * D out. Reading in row order instead would fetch most
             tokens K times, as an expert's tokens are spread over more than the L2 cache holds.
ranks        counting sort in two passes over N keys: the histogram of each block of keys; then, by
             the sums of earlier histograms, the place of each key, by a running count of every key
             value in turn. N * E additions in each, against a radix sort's several passes.
"""

# T tokens  D width  K choices a token  R rows  N keys  E key values

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton


def _width(d: int) -> int:
  """Columns of a tile: the widest that leaves at most an eighth of the last one empty."""
  for width in (1024, 512, 256):
    if -(-d // width) * width * 8 <= d * 9:
      return width
  return 128


def _grid(x, y):
  """Both indices of an index array for each element: what GPU and interpreter both take."""
  shape = x.shape[0], y.shape[0]
  return jnp.broadcast_to(x[:, None], shape), jnp.broadcast_to(y[None, :], shape)


def _spread_kernel(x_ref, row_ref, out_ref, *, tokens, width):
  num_tokens, choices = row_ref.shape
  num_rows, d = out_ref.shape
  columns = jnp.int32(pl.cdiv(d, width))
  pid = pl.program_id(0)
  token = jax.lax.div(pid, columns) * tokens + jnp.arange(tokens)
  col = jax.lax.rem(pid, columns) * width + jnp.arange(width)
  real, at = token < num_tokens, _grid(token, col)
  inside = at[1] < d
  x = plt.load(x_ref.at[at], mask=inside & real[:, None], other=jnp.zeros((), x_ref.dtype))
  for k in range(choices):
    row = plt.load(row_ref.at[token, jnp.full_like(token, k)], mask=real, other=num_rows)
    there = row < num_rows
    plt.store(out_ref.at[_grid(row, col)], x, mask=inside & there[:, None])


def spread_rows(
  x_TD: jax.Array,
  token_R: jax.Array,
  row_TK: jax.Array,
  *,
  elements: int = 4096,
  num_warps: int = 4,
) -> jax.Array:
  (num_tokens, d), width = x_TD.shape, _width(x_TD.shape[1])
  tokens = elements // width
  return pallas_triton.call(
    functools.partial(_spread_kernel, tokens=tokens, width=width),
    x_TD,
    row_TK,
    grid=(pl.cdiv(num_tokens, tokens) * pl.cdiv(d, width),),
    out=jax.ShapeDtypeStruct((len(token_R), d), x_TD.dtype),
    num_warps=num_warps,
  )


def _histogram_kernel(key_ref, count_ref, *, block, some, num_values):
  num_keys = key_ref.shape[0]
  pid = pl.program_id(0)
  value = jnp.arange(num_values)

  def add(i, count):
    at = pid * block + i * some + jnp.arange(some)
    key = plt.load(key_ref.at[at], mask=at < num_keys, other=-1)
    return count + (key[:, None] == value[None, :]).astype(jnp.int32).sum(0)

  count = jax.lax.fori_loop(0, block // some, add, jnp.zeros(num_values, jnp.int32))
  plt.store(count_ref.at[pid, pl.ds(0, num_values)], count)


def _rank_kernel(key_ref, before_ref, rank_ref, *, block, some, num_values):
  num_keys = key_ref.shape[0]
  pid = pl.program_id(0)
  value = jnp.arange(num_values)

  def place(i, before):
    at = pid * block + i * some + jnp.arange(some)
    key = plt.load(key_ref.at[at], mask=at < num_keys, other=-1)
    same = (key[:, None] == value[None, :]).astype(jnp.int32)
    # counts itself: one too many
    rank = (same * (before[None, :] + jnp.cumsum(same, axis=0))).sum(1) - 1
    plt.store(rank_ref.at[at], rank, mask=at < num_keys)
    return before + same.sum(0)

  before = plt.load(before_ref.at[pid, pl.ds(0, num_values)])
  jax.lax.fori_loop(0, block // some, place, before)


def ranks(key_N: jax.Array, num_keys: int, *, block: int = 512) -> tuple[jax.Array, jax.Array]:
  n, num_values = len(key_N), pl.next_power_of_2(max(num_keys, 16))
  sizes = dict(block=block, some=max(16, 8192 // num_values), num_values=num_values)
  num_blocks = pl.cdiv(n, block)
  count_BE = pallas_triton.call(
    functools.partial(_histogram_kernel, **sizes),
    key_N,
    grid=(num_blocks,),
    out=jax.ShapeDtypeStruct((num_blocks, num_values), jnp.int32),
  )
  upto_BE = jnp.cumsum(count_BE, axis=0)
  rank_N = pallas_triton.call(
    functools.partial(_rank_kernel, **sizes),
    key_N,
    upto_BE - count_BE,
    grid=(num_blocks,),
    out=jax.ShapeDtypeStruct((n,), jnp.int32),
  )
  return rank_N, upto_BE[-1, :num_keys]
