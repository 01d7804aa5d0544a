"""Triton kernels that copy tokens to their rows, bound by memory, and that count.

spread_rows  program: some tokens x up to 1024 columns, read once and written to each of the K rows
             of each token: T * D in, R * D out. Reading in row order instead would fetch most
             tokens K times, as an expert's tokens are spread over more than the L2 cache holds.
             A few programs more write zeros into the gaps behind groups.
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
from moe_jax.ops.permute.plan import Plan


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


def _spread_kernel(x_ref, row_ref, *rest, tokens, width, multiple):
  *group_refs, out_ref = rest
  num_tokens, choices = row_ref.shape
  num_rows, d = out_ref.shape
  columns = jnp.int32(pl.cdiv(d, width))
  pid = pl.program_id(0)
  block = jax.lax.div(pid, columns)
  col = jax.lax.rem(pid, columns) * width + jnp.arange(width)
  token = block * tokens + jnp.arange(tokens)
  real, at = token < num_tokens, _grid(token, col)
  inside = at[1] < d
  x = plt.load(x_ref.at[at], mask=inside & real[:, None], other=jnp.zeros((), x_ref.dtype))
  for k in range(choices):
    row = plt.load(row_ref.at[token, jnp.full_like(token, k)], mask=real, other=num_rows)
    there = row < num_rows
    plt.store(out_ref.at[_grid(row, col)], x, mask=inside & there[:, None])

  if group_refs:
    size_ref, offset_ref = group_refs
    # the last programs have one group each, and no tokens
    e = block - pl.cdiv(num_tokens, tokens)
    has_gap = e >= 0
    e = jnp.maximum(e, 0)
    start = plt.load(offset_ref.at[e]) + plt.load(size_ref.at[e])
    end = jax.lax.div(start + multiple - 1, multiple) * multiple
    steps = jnp.where(has_gap, pl.cdiv(end - start, tokens), 0)

    def clear(i, _):
      row = start + i * tokens + jnp.arange(tokens)
      at = _grid(row, col)
      plt.store(out_ref.at[at], jnp.zeros_like(x), mask=(at[0] < end) & inside)

    jax.lax.fori_loop(0, steps, clear, None)


def spread_rows(
  x_TD: jax.Array,
  plan: Plan,
  *,
  multiple: int = 1,
  elements: int = 4096,
  num_warps: int = 4,
) -> jax.Array:
  if x_TD.dtype.itemsize == 1 and x_TD.dtype != jnp.int8:
    bits_TD = jax.lax.bitcast_convert_type(x_TD, jnp.int8)
    bits_RD = spread_rows(bits_TD, plan, multiple=multiple, elements=elements, num_warps=num_warps)
    return jax.lax.bitcast_convert_type(bits_RD, x_TD.dtype)
  (num_tokens, d), width = x_TD.shape, _width(x_TD.shape[1])
  tokens = elements // width
  groups = (plan.size_E, plan.offset_E) if multiple > 1 else ()
  blocks = pl.cdiv(num_tokens, tokens) + (len(plan.size_E) if groups else 0)
  return pallas_triton.call(
    functools.partial(_spread_kernel, tokens=tokens, width=width, multiple=multiple),
    x_TD,
    plan.row_TK,
    *groups,
    grid=(blocks * pl.cdiv(d, width),),
    out=jax.ShapeDtypeStruct((len(plan.choice_R), d), x_TD.dtype),
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
