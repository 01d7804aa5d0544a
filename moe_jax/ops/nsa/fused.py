"""NSA on whole rows in memory linear in the row: the branches' kernels, and the choice between.

A query's compressed blocks are a run of neighbours, as are its window's tokens; what it chose is a
list of blocks. Importance is made for some queries at a time, so that nothing of [S, S] is held.

Backward, the gate g of a branch scales its probabilities instead of the output's gradient: kernels
are given lse - log2(g), and then the same gradient and sums serve all: no branch has its own copy.

  dk, dv, dq of  g softmax(s) v  =  those of  exp2(s - (lse - log2 g)) v,  delta = sum of o do
"""

# B batch  S tokens  N compressed blocks  G key-value heads  M query heads of each  C width
# K chosen blocks  T tokens of all rows (B*S)  R keys of all rows  J selection blocks of a document

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.ops.nsa import (
  mosaic_importance,
  runs,
  triton_block_keys,
  triton_blocks,
  triton_runs,
)
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
    gate_BSGM3: not negative.
  """
  branches = *compressed, *selected, *window
  back_BS = jnp.minimum(position_BS, sizes.window - 1)
  near = jnp.arange(position_BS.shape[1], dtype=jnp.int32) - back_BS, back_BS + 1
  seen = blocks_seen(position_BS, segment_BS, sizes)
  return _mixed((sizes, scale), q_BSGMC, branches, gate_BSGM3, seen, near, position_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(
  statics: tuple[Sizes, float],
  q_BSGMC: jax.Array,
  branches: tuple[jax.Array, ...],
  gate_BSGM3: jax.Array,
  seen: tuple[jax.Array, jax.Array],
  near: tuple[jax.Array, jax.Array],
  position_BS: jax.Array,
) -> jax.Array:
  """The branches' outputs, mixed by their gates.

  Args:
    branches: keys and values of the three. seen, near: runs over compressed blocks and tokens.
  """
  return _mixed_forward(statics, q_BSGMC, branches, gate_BSGM3, seen, near, position_BS)[0]


def _mixed_forward(statics, q_BSGMC, branches, gate_BSGM3, seen, near, position_BS):
  sizes, scale = statics
  S = q_BSGMC.shape[1]
  compressed, selected, window = _pairs(branches)
  attend = functools.partial(runs.forward, q_BSGMC, scale=scale)
  parts = [attend(*compressed, seen[0], seen[1])]
  row_B1 = jnp.arange(seen[0].shape[0], dtype=jnp.int32)[:, None]
  first_T = _flat(seen[0] + row_B1 * compressed[0].shape[1])
  position_T = _flat(position_BS)
  block_TGK = _choose(
    _flat(q_BSGMC), _flat(compressed[0]), first_T, _flat(seen[1]), _flat(parts[0][1]), position_T,
    sizes=sizes, scale=scale, length=S,
  )  # fmt: skip
  document_T = jnp.arange(position_T.size, dtype=jnp.int32) - position_T
  start_TGK = document_T[:, None, None] + block_TGK * sizes.select_length
  some_T = jnp.minimum(position_T // sizes.select_length + 1, block_TGK.shape[-1])
  o_TGMC, lse_TGM = triton_blocks.forward(
    _flat(q_BSGMC), _flat(selected[0]), _flat(selected[1]), start_TGK, some_T,
    length=sizes.select_length, scale=scale,
  )  # fmt: skip
  parts.append((o_TGMC.reshape(q_BSGMC.shape), lse_TGM.reshape(q_BSGMC.shape[:-1])))
  parts.append(attend(*window, near[0], near[1]))
  outs, lses = [o for o, _ in parts], [lse for _, lse in parts]
  wide = lambda a: a.astype(jnp.float32)
  mixed = sum(wide(gate_BSGM3[..., i, None]) * wide(o) for i, o in enumerate(outs))
  kept = q_BSGMC, branches, gate_BSGM3, seen, near, position_BS, start_TGK, some_T, outs, lses
  return jnp.asarray(mixed).astype(q_BSGMC.dtype), kept


def _mixed_backward(statics, kept, do_BSGMC):
  sizes, scale = statics
  q_BSGMC, branches, gate_BSGM3, seen, near, position_BS, start_TGK, some_T, outs, lses = kept
  wide = lambda a: a.astype(jnp.float32)
  deltas = [(wide(o) * wide(do_BSGMC)).sum(-1) for o in outs]
  lses = [lse - jnp.log2(wide(gate_BSGM3[..., i])) for i, lse in enumerate(lses)]
  compressed, selected, window = _pairs(branches)

  def of_run(i, pair, run):
    sums = do_BSGMC, lses[i], deltas[i]
    return runs.gradients(q_BSGMC, pair[0], pair[1], run[0], run[1], *sums, scale=scale)

  of_blocks = _block_gradients(
    _flat(q_BSGMC), _flat(selected[0]), _flat(selected[1]), start_TGK, some_T, _flat(do_BSGMC),
     _flat(lses[1]), _flat(deltas[1]), length=sizes.select_length, scale=scale,
  )  # fmt: skip
  grads = of_run(0, compressed, seen), of_blocks, of_run(2, window, near)
  dq_BSGMC = sum(wide(dq.reshape(q_BSGMC.shape)) for dq, _, _ in grads)
  dbranches = tuple(d for _, dk, dv in grads for d in (dk, dv))
  dbranches = tuple(d.reshape(a.shape) for d, a in zip(dbranches, branches, strict=True))
  dgate_BSGM3 = jnp.stack(deltas, axis=-1).astype(gate_BSGM3.dtype)
  none = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), (seen, near, position_BS))
  return jnp.asarray(dq_BSGMC).astype(q_BSGMC.dtype), dbranches, dgate_BSGM3, *none


_mixed.defvjp(_mixed_forward, _mixed_backward)


def _pairs(branches):
  """Keys and values of each."""
  k1, v1, k2, v2, k3, v3 = branches
  return (k1, v1), (k2, v2), (k3, v3)


def _flat(a: jax.Array) -> jax.Array:
  return a.reshape(-1, *a.shape[2:])


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


def _block_gradients(
  q_TGMC: jax.Array,
  k_TGC: jax.Array,
  v_TGC: jax.Array,
  start_TGK: jax.Array,
  count_T: jax.Array,
  do_TGMC: jax.Array,
  lse_TGM: jax.Array,
  delta_TGM: jax.Array,
  *,
  length: int,
  scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dq, dk and dv of attention over chosen blocks."""
  (T, G, K), C = start_TGK.shape, k_TGC.shape[-1]
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
    totals = triton_block_keys.key_gradient(
      totals, *operands, order_P, begin, *sums, length=length, scale=scale
    )
    return totals, None

  zeros = jnp.zeros((T, G, C), jnp.float32)
  firsts = jnp.arange(chunks, dtype=jnp.int32) * queries
  (dk_TGC, dv_TGC), _ = lax.scan(chunk, (zeros, zeros), (firsts, starts, counts))
  return dq_TGMC, dk_TGC.astype(k_TGC.dtype), dv_TGC.astype(v_TGC.dtype)
