"""NSA on whole rows in memory linear in the row: the branches' kernels, and the choice between.

A query's compressed blocks are a run of neighbours, as are its window's tokens; what it chose is a
list of blocks. Importance is made for some queries at a time, so that nothing of [S, S] is held.
"""

# B batch  S tokens  N compressed blocks  G key-value heads  M query heads of each  C width
# K chosen blocks  T tokens of all rows (B*S)  R keys of all rows  J selection blocks of a document

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.attention import attention as dense
from moe_jax.ops.nsa import mosaic_importance, runs, triton_blocks, triton_runs
from moe_jax.ops.nsa.reference import KeyValue, Sizes
from moe_jax.ops.nsa.triton_choice import top_blocks
from moe_jax.ops.row_sums import inverse

# of importance, and of choices that are sorted, held at a time
_CHUNK_BYTES = 1 << 29
_CHUNK_CHOICES = 1 << 22


def unsupported(q_BSGMC: jax.Array, v_width: int, sizes: Sizes) -> str | None:
  """Why these kernels cannot run here, in one line, or None if they can."""
  M, C = q_BSGMC.shape[3:]
  power = lambda n: n & (n - 1) == 0
  if problem := runs.unsupported(C, v_width):
    return problem
  if not power(M) or M > triton_runs.ROWS:
    return f'needs 1, 2, 4, .. {triton_runs.ROWS} query heads a group, got {M}'
  if not sizes.compress_length <= sizes.select_length <= triton_runs.KEYS:
    return (
      f'needs compress_length <= select_length <= {triton_runs.KEYS}, '
      f'got {sizes.compress_length} and {sizes.select_length}'
    )
  if not power(sizes.select_length) or not power(sizes.stride):
    return f'needs powers of two, got {sizes.select_length} tokens a block every {sizes.stride}'
  if q_BSGMC.dtype != jnp.bfloat16:
    return f'needs bfloat16, got {q_BSGMC.dtype}'
  return None


def attention(
  q_BSGMC: jax.Array,
  compressed: KeyValue,
  selected: KeyValue,
  window: KeyValue,
  gate_BSGM3: jax.Array,
  position_BS: jax.Array,
  segment_BS: jax.Array,
  *,
  sizes: Sizes,
  scale: float,
) -> jax.Array:
  """As reference.attention without a cache, on one device.

  Args:
    compressed: of `closed_blocks` only, [B, N, G, C], in their order.
  """
  B, S, G, M, C = q_BSGMC.shape
  flat = lambda a: a.reshape(-1, *a.shape[2:])
  row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
  first_BS, count_BS = blocks_seen(position_BS, segment_BS, sizes)
  first_T = flat(first_BS + row_B1 * compressed.k_BTGC.shape[1])
  q_TGMC, count_T = flat(q_BSGMC), flat(count_BS)
  out: Any = runs.attention(scale, q_BSGMC, *compressed, first_BS, count_BS)
  o_BSGMC, lse_BSGM = out
  outputs = [o_BSGMC]

  position_T, token_T = flat(position_BS), jnp.arange(B * S, dtype=jnp.int32)
  chosen = functools.partial(_choose, sizes=sizes, scale=scale, length=S)
  keys = flat(compressed.k_BTGC)
  args = lax.stop_gradient((q_TGMC, keys, first_T, count_T, flat(lse_BSGM), position_T))
  block_TGK = chosen(*args)
  start_TGK = (token_T - position_T)[:, None, None] + block_TGK * sizes.select_length
  some_T = jnp.minimum(position_T // sizes.select_length + 1, block_TGK.shape[-1])
  statics = scale, sizes.select_length
  picked: Any = _over_blocks(
    statics, q_TGMC, flat(selected.k_BTGC), flat(selected.v_BTGV), start_TGK, some_T
  )
  outputs.append(picked.reshape(q_BSGMC.shape))

  start_B = jnp.zeros_like(position_BS[:, 0])
  near = dense(
    q_BSGMC.reshape(B, S, G * M, C), window.k_BTGC, window.v_BTGV, segment_BS, segment_BS, start_B,
    scale=scale, window=sizes.window,
  )  # fmt: skip
  outputs.append(near.reshape(q_BSGMC.shape))
  gate_BSGM3 = gate_BSGM3.astype(jnp.float32)
  mixed = (gate_BSGM3[..., i, None] * o.astype(jnp.float32) for i, o in enumerate(outputs))
  return sum(mixed, jnp.zeros(q_BSGMC.shape, jnp.float32)).astype(q_BSGMC.dtype)


def closed_blocks(
  position_BS: jax.Array, segment_BS: jax.Array, sizes: Sizes
) -> tuple[jax.Array, jax.Array]:
  """Index in the row of the last token of each compression block, and that token's position.

  [B, N] with N = S / stride, rounded up; places beyond the last block repeat the row's end.
  """
  num = -(-position_BS.shape[1] // sizes.stride)
  closes_BS = _closes(position_BS, segment_BS, sizes)

  def row(closes_S, position_S):
    end_N = jnp.nonzero(closes_S, size=num, fill_value=closes_S.size - 1)[0]
    return end_N, position_S[end_N]

  return jax.vmap(row)(closes_BS, position_BS)


def block_tokens(x_BSGC: jax.Array, end_BN: jax.Array, length: int) -> jax.Array:
  """The `length` tokens up to each block's end, [B, N, G, length, C]."""
  at_BNL = jnp.maximum(end_BN[..., None] - length + 1 + jnp.arange(length), 0)
  block_BNLGC = jax.vmap(lambda x_SGC, at_NL: x_SGC[at_NL])(x_BSGC, at_BNL)
  return jnp.swapaxes(block_BNLGC, 2, 3)


def _closes(position_BS, segment_BS, sizes: Sizes) -> jax.Array:
  behind_BS = position_BS - (sizes.compress_length - 1)
  return (segment_BS > 0) & (behind_BS >= 0) & (behind_BS % sizes.stride == 0)


def blocks_seen(position_BS, segment_BS, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
  """The first compressed block of each query's run and how many there are."""
  behind_BS = position_BS - (sizes.compress_length - 1)
  count_BS = jnp.where((segment_BS > 0) & (behind_BS >= 0), behind_BS // sizes.stride + 1, 0)
  closed_BS = jnp.cumsum(_closes(position_BS, segment_BS, sizes), axis=1, dtype=jnp.int32)
  return closed_BS - count_BS, count_BS


def _choose(
  q_TGMC, k_RGC, first_T, count_T, lse_TGM, position_T, *, sizes: Sizes, scale: float, length: int
) -> jax.Array:
  """The chosen blocks of each query and group, by number in the document: [T, G, K]."""
  T, G, M, _ = q_TGMC.shape
  blocks = -(-length // sizes.select_length)
  K = min(sizes.top_blocks, blocks)
  by_mosaic = runs.by_dense_kernels(q_TGMC) and M in (8, 16, 32, 64, 128)
  importance = mosaic_importance.importance if by_mosaic else triton_runs.importance
  step = max((mosaic_importance.ROWS if by_mosaic else triton_runs.ROWS) // M, 1)
  queries = max(1, min(T, _CHUNK_BYTES // (G * k_RGC.shape[0] * 4)) // step) * step

  def chunk(start: jax.Array) -> jax.Array:
    sum_QGR = importance(
      q_TGMC, k_RGC, first_T, count_T, lse_TGM, start[None], queries=queries, scale=scale
    )
    cut = lambda a_T: lax.dynamic_slice(jnp.pad(a_T, (0, queries)), (start,), (queries,))
    return top_blocks(
      sum_QGR, cut(first_T), cut(count_T), cut(position_T) // sizes.select_length,
      k=K, blocks=blocks, per_block=sizes.select_length // sizes.stride,
      reach=sizes.compress_length // sizes.stride,
    )  # fmt: skip

  starts = jnp.arange(-(-T // queries), dtype=jnp.int32) * queries
  return lax.map(chunk, starts).reshape(-1, G, K)[:T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_blocks(statics: tuple[float, int], q_TGMC, k_TGC, v_TGC, start_TGK, count_T):
  scale, length = statics
  args = q_TGMC, k_TGC, v_TGC, start_TGK, count_T
  return triton_blocks.forward(*args, length=length, scale=scale)[0]


def _over_blocks_forward(statics, *args):
  scale, length = statics
  o_TGMC, lse_TGM = triton_blocks.forward(*args, length=length, scale=scale)
  return o_TGMC, (*args, o_TGMC, lse_TGM)


def _over_blocks_backward(statics, kept, do_TGMC):
  scale, length = statics
  q_TGMC, k_TGC, v_TGC, start_TGK, count_T, o_TGMC, lse_TGM = kept
  (T, G, K), C = start_TGK.shape, k_TGC.shape[-1]
  delta_TGM = (o_TGMC.astype(jnp.float32) * do_TGMC.astype(jnp.float32)).sum(-1)
  operands = q_TGMC, do_TGMC, k_TGC, v_TGC
  sums = lse_TGM, delta_TGM
  dq_TGMC = triton_blocks.query_gradient(
    *operands, start_TGK, count_T, *sums, length=length, scale=scale
  )
  queries = max(1, min(T, _CHUNK_CHOICES // (G * K)))
  chunks = -(-T // queries)
  padded = lambda a: jnp.pad(a, ((0, chunks * queries - T), *((0, 0),) * (a.ndim - 1)))
  starts = padded(start_TGK).reshape(chunks, queries, G, K)
  counts = padded(count_T).reshape(chunks, queries)

  def chunk(totals, at):
    first, start_QGK, count_Q = at
    number_QGK = start_QGK * G + jnp.arange(G)[:, None]
    number_QGK = jnp.where(jnp.arange(K) < count_Q[:, None, None], number_QGK, T * G)
    order_P, begin = inverse(number_QGK.reshape(-1), T * G)
    order_P = first + order_P // (G * K)
    totals = triton_blocks.key_gradient(
      totals, *operands, order_P, begin, *sums, length=length, scale=scale
    )
    return totals, None

  zeros = jnp.zeros((T, G, C), jnp.float32)
  firsts = jnp.arange(chunks, dtype=jnp.int32) * queries
  (dk_TGC, dv_TGC), _ = lax.scan(chunk, (zeros, zeros), (firsts, starts, counts))
  return dq_TGMC, dk_TGC.astype(k_TGC.dtype), dv_TGC.astype(v_TGC.dtype), None, None


_over_blocks.defvjp(_over_blocks_forward, _over_blocks_backward)
