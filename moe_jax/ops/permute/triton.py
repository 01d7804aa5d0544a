"""Triton kernels that move rows, bound by memory, and that count, bound by arithmetic.

gather_rows  program: some rows x up to 1024 columns. Reads each row it names, from L2 when tokens
             come in order, and writes R * D once.
sum_rows     program: some tokens x up to 1024 columns, the K rows of a token added in registers in
             the order of k. Reads every named row once and writes T * D.
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

_ELEMENTS = 8192  # of a program's tile: each thread has several 16-byte reads in flight


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


def _gather_kernel(x_ref, token_ref, out_ref, *, rows, width):
  num_tokens, d = x_ref.shape
  num_rows = out_ref.shape[0]
  columns = jnp.int32(pl.cdiv(d, width))
  pid = pl.program_id(0)
  row = jax.lax.div(pid, columns) * rows + jnp.arange(rows)
  col = jax.lax.rem(pid, columns) * width + jnp.arange(width)
  token = plt.load(token_ref.at[row], mask=row < num_rows, other=num_tokens)
  there = token < num_tokens
  source, at = _grid(jnp.where(there, token, 0), col), _grid(row, col)
  inside = at[1] < d
  x = plt.load(x_ref.at[source], mask=inside & there[:, None], other=0)
  plt.store(out_ref.at[at], x, mask=inside & (at[0] < num_rows))


def gather_rows(
  x_TD: jax.Array, token_R: jax.Array, *, elements: int = _ELEMENTS, num_warps: int = 4
) -> jax.Array:
  if x_TD.dtype.itemsize == 1:
    bits_TD = jax.lax.bitcast_convert_type(x_TD, jnp.int8)
    bits_RD = _gather(bits_TD, token_R, elements, num_warps)
    return jax.lax.bitcast_convert_type(bits_RD, x_TD.dtype)
  return _gather(x_TD, token_R, elements, num_warps)


def _gather(x_TD, token_R, elements, num_warps):
  d, width = x_TD.shape[1], _width(x_TD.shape[1])
  rows = elements // width
  return pallas_triton.call(
    functools.partial(_gather_kernel, rows=rows, width=width),
    x_TD,
    token_R,
    grid=(pl.cdiv(len(token_R), rows) * pl.cdiv(d, width),),
    out=jax.ShapeDtypeStruct((len(token_R), d), x_TD.dtype),
    num_warps=num_warps,
  )


def _sum_kernel(y_ref, row_ref, *rest, tokens, width):
  *weight_ref, out_ref = rest
  num_rows, d = y_ref.shape
  num_tokens, choices = row_ref.shape
  columns = jnp.int32(pl.cdiv(d, width))
  pid = pl.program_id(0)
  token = jax.lax.div(pid, columns) * tokens + jnp.arange(tokens)
  col = jax.lax.rem(pid, columns) * width + jnp.arange(width)
  real = token < num_tokens
  total = jnp.zeros((tokens, width), jnp.float32)
  for k in range(choices):
    at_k = token, jnp.full_like(token, k)
    row = plt.load(row_ref.at[at_k], mask=real, other=num_rows)
    there = row < num_rows
    source = _grid(jnp.where(there, row, 0), col)
    y = plt.load(y_ref.at[source], mask=there[:, None] & (source[1] < d), other=0)
    y = y.astype(jnp.float32)
    if weight_ref:
      y *= plt.load(weight_ref[0].at[at_k], mask=real, other=0)[:, None]
    total += y
  at = _grid(token, col)
  plt.store(out_ref.at[at], total.astype(out_ref.dtype), mask=real[:, None] & (at[1] < d))


def sum_rows(
  y_RD: jax.Array,
  row_TK: jax.Array,
  weight_TK: jax.Array | None = None,
  *,
  elements: int = _ELEMENTS // 2,
  num_warps: int = 4,
) -> jax.Array:
  num_tokens, d = len(row_TK), y_RD.shape[1]
  width = _width(d)
  tokens = elements // width
  weight = () if weight_TK is None else (weight_TK.astype(jnp.float32),)
  return pallas_triton.call(
    functools.partial(_sum_kernel, tokens=tokens, width=width),
    y_RD,
    row_TK,
    *weight,
    grid=(pl.cdiv(num_tokens, tokens) * pl.cdiv(d, width),),
    out=jax.ShapeDtypeStruct((num_tokens, d), y_RD.dtype),
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
