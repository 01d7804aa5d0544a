"""The indexer's loss without scores of all pairs: its gradient is made with it, a chunk at a time.

The loss is a scalar, so its gradient for a cotangent of 1 is all that the backward pass needs to
know. The forward pass makes it along with the loss, from the same scores, and keeps only that:
nothing of the size of the chosen pairs stays in memory.
"""

# S queries  T keys  J index heads  I index width  H main heads  C main key width  K chosen
# M queries of a chunk

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops import backends, row_sums
from moe_jax.ops.indexer import reference, triton_loss

_CHUNK_ELEMENTS = 2**26
# of the pairs' rows, where a kernel leaves nothing else: 1 GiB in bfloat16
_KERNEL_CHUNK_ELEMENTS = 2**29


def sparse_index_loss(
  q_SJI: Float[Array, 'S J I'],
  k_TI: Float[Array, 'T I'],
  weight_SJ: Float[Array, 'S J'],
  index_SK: Int[Array, 'S K'],
  count_S: Int[Array, 'S'],
  target_SK: Float[Array, 'S K'],
  importance_S: Float[Array, 'S'],
  *,
  implementation: str | None = None,
) -> Float[Array, '']:
  """sum_s importance_s KL(target_s || softmax(index scores of the chosen keys)).

  As `reference.index_loss` over the mask that the index stands for. Differentiable in q, k and
  weight; deterministic.

  Args:
    target_SK: float32, sums to 1 over the first count_S slots of each query that matters.
    implementation: 'triton' (bfloat16) or 'xla', which then runs or raises NotImplementedError with
      the reason. None takes the fastest that can.
  """
  data = jax.lax.stop_gradient((index_SK, count_S, target_SK, importance_S))
  problem = triton_loss.unsupported(q_SJI.dtype, *q_SJI.shape[1:])
  by = backends.choose('sparse_index_loss', implementation, problem, fast='triton')
  chunks = _kernel_chunks if by == 'triton' else _sparse_chunks
  return _with_gradient(chunks, (q_SJI, k_TI, weight_SJ), data)


def dense_index_loss(
  q_SJI: Float[Array, 'S J I'],
  k_SI: Float[Array, 'S I'],
  weight_SJ: Float[Array, 'S J'],
  main_q_SHC: Float[Array, 'S H C'],
  main_k_SHC: Float[Array, 'S H C'],
  segment_S: Int[Array, 'S'],
  importance_S: Float[Array, 'S'],
  *,
  scale: float,
  head_axis: str | None = None,
) -> Float[Array, '']:
  """As sparse_index_loss over every key of a query's document up to itself.

  Against the mean of the main attention's probabilities; scores and probabilities exist for some
  queries, and one head, at a time.

  Args:
    head_axis: the mesh axis that splits the main heads, inside shard_map.
  """
  data = jax.lax.stop_gradient((main_q_SHC, main_k_SHC, segment_S, importance_S))
  return _with_gradient(
    functools.partial(_dense_chunks, scale=scale, head_axis=head_axis),
    (q_SJI, k_SI, weight_SJ),
    data,
  )


def _kernel_chunks(q_SJI, k_TI, weight_SJ, index_SK, count_S, target_SK, importance_S):
  (S, J, I), T = q_SJI.shape, k_TI.shape[0]
  named_SK = jnp.arange(index_SK.shape[1]) < count_S[:, None]
  whole = lambda a, fill: jnp.pad(
    jnp.where(named_SK, a, fill), ((0, 0), (0, -a.shape[1] % triton_loss.BLOCK)),
    constant_values=fill,
  )  # fmt: skip
  key_SK, target_SK = whole(index_SK, T), whole(target_SK, 0)
  size = chunk_size(S, key_SK.shape[1] * I, _KERNEL_CHUNK_ELEMENTS)

  def one_chunk(carry, args):
    loss, dk_TI = carry
    q, weight, key, count, target, importance = args
    index = jnp.where(key < T, key, 0)
    kl_M, dq_MJI, dweight_MJ, pair_MKI = triton_loss.loss_and_gradients(
      q, k_TI, weight, index, count, target, importance
    )
    order, start = row_sums.inverse(key.reshape(-1), T)
    dk_TI = row_sums.add_rows(dk_TI, pair_MKI.reshape(-1, I), order, start)
    return (loss + (kl_M * importance).sum(), dk_TI), (dq_MJI, dweight_MJ)

  split = lambda a: a.reshape(S // size, size, *a.shape[1:])
  args = q_SJI, weight_SJ, key_SK, count_S, target_SK, importance_S
  zero = jnp.float32(0), jnp.zeros((T, I), jnp.float32)
  (loss, dk_TI), (dq, dweight) = jax.lax.scan(one_chunk, zero, tuple(map(split, args)))
  return loss, (dq.reshape(S, J, I), dk_TI, dweight.reshape(S, J))


def _sparse_chunks(q_SJI, k_TI, weight_SJ, index_SK, count_S, target_SK, importance_S):
  (S, J, I), T, K = q_SJI.shape, k_TI.shape[0], index_SK.shape[1]
  size = chunk_size(S, K * (J + I))

  def one_chunk(carry, args):
    loss, dk_TI = carry
    q, weight, index, count, target, importance = args
    k_MKI = k_TI[index]
    dot_MJK = jnp.einsum('mji,mki->mjk', q, k_MKI, preferred_element_type=jnp.float32)
    positive_MJK = jax.nn.relu(dot_MJK)
    score_MK = jnp.einsum('mjk,mj->mk', positive_MJK, weight) * I**-0.5
    named_MK = jnp.arange(K) < count[:, None]
    log_q_MK = jax.nn.log_softmax(jnp.where(named_MK, score_MK, -1e30), axis=-1)
    kl_MK = jax.scipy.special.xlogy(target, target) - target * log_q_MK
    kl_MK = jnp.where(named_MK, kl_MK, 0)
    total_M1 = jnp.where(named_MK, target, 0).sum(-1, keepdims=True)
    dscore_MK = jnp.where(named_MK, jnp.exp(log_q_MK) * total_M1 - target, 0)
    dscore_MK *= importance[:, None] * I**-0.5
    dweight_MJ = jnp.einsum('mk,mjk->mj', dscore_MK, positive_MJK)
    ddot_MJK = jnp.where(dot_MJK > 0, dscore_MK[:, None] * weight[..., None], 0).astype(q.dtype)
    dq_MJI = jnp.einsum('mjk,mki->mji', ddot_MJK, k_MKI)
    pair_MKI = jnp.einsum('mjk,mji->mki', ddot_MJK, q)
    key_MK = jnp.where(named_MK, index, T)
    order, start = row_sums.inverse(key_MK.reshape(-1), T)
    dk_TI = row_sums.add_rows(dk_TI, pair_MKI.reshape(-1, I), order, start)
    loss += (kl_MK.sum(-1) * importance).sum()
    return (loss, dk_TI), (dq_MJI, dweight_MJ)

  split = lambda a: a.reshape(S // size, size, *a.shape[1:])
  args = q_SJI, weight_SJ.astype(jnp.float32), index_SK, count_S, target_SK, importance_S
  zero = jnp.float32(0), jnp.zeros((T, I), jnp.float32)
  (loss, dk_TI), (dq, dweight) = jax.lax.scan(one_chunk, zero, tuple(map(split, args)))
  return loss, (dq.reshape(S, J, I), dk_TI, dweight.reshape(S, J))


def _dense_chunks(
  q_SJI,
  k_SI,
  weight_SJ,
  main_q_SHC,
  main_k_SHC,
  segment_S,
  importance_S,
  *,
  scale: float,
  head_axis: str | None,
):
  (S, J, I), H = q_SJI.shape, main_q_SHC.shape[1]
  size = chunk_size(S, S * J)
  position_S = jnp.arange(S)

  def one_chunk(carry, args):
    loss, dk_SI = carry
    q, weight, main_q, segment, position, importance = args
    mask_MS = (position_S <= position[:, None]) & (segment[:, None] == segment_S)

    def add_head(target_MS, head):
      score_MS = jnp.einsum('mc,sc->ms', *head, preferred_element_type=jnp.float32) * scale
      return target_MS + jax.nn.softmax(jnp.where(mask_MS, score_MS, -1e30), axis=-1), None

    heads = jnp.moveaxis(main_q, 1, 0), jnp.moveaxis(main_k_SHC, 1, 0)
    target_MS, _ = jax.lax.scan(add_head, jnp.zeros(mask_MS.shape, jnp.float32), heads)
    target_MS = target_MS / H if head_axis is None else jax.lax.pmean(target_MS / H, head_axis)

    def chunk_loss(q, k, weight):
      score_MS = reference.index_scores(q[None], k[None], weight[None])[0]
      log_q_MS = jax.nn.log_softmax(jnp.where(mask_MS, score_MS, -1e30), axis=-1)
      kl_MS = jax.scipy.special.xlogy(target_MS, target_MS) - target_MS * log_q_MS
      return (jnp.where(mask_MS, kl_MS, 0).sum(-1) * importance).sum()

    part, (dq, dk, dweight) = jax.value_and_grad(chunk_loss, (0, 1, 2))(q, k_SI, weight)
    return (loss + part, dk_SI + dk.astype(jnp.float32)), (dq, dweight)

  split = lambda a: a.reshape(S // size, size, *a.shape[1:])
  args = q_SJI, weight_SJ.astype(jnp.float32), main_q_SHC, segment_S, position_S, importance_S
  zero = jnp.float32(0), jnp.zeros((S, I), jnp.float32)
  (loss, dk_SI), (dq, dweight) = jax.lax.scan(one_chunk, zero, tuple(map(split, args)))
  return loss, (dq.reshape(S, J, I), dk_SI, dweight.reshape(S, J))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient(chunks: Callable, learned: tuple, data: tuple) -> jax.Array:
  """The loss of `chunks(*learned, *data)`, which returns it and its gradient in `learned`."""
  return chunks(*learned, *data)[0]


def _forward(chunks, learned, data):
  loss, grads = chunks(*learned, *data)
  grads = tuple(g.astype(a.dtype) for g, a in zip(grads, learned, strict=True))
  return loss, (grads, data)


def _backward(chunks, kept, dloss):
  del chunks
  grads, data = kept
  grads = tuple((g.astype(jnp.float32) * dloss).astype(g.dtype) for g in grads)
  none = jax.tree.map(lambda _: None, data)
  return grads, none


_with_gradient.defvjp(_forward, _backward)


def chunk_size(num_queries: int, elements_a_query: int, elements: int = _CHUNK_ELEMENTS) -> int:
  """The largest divisor of the queries that keeps a chunk's pairs in bounds, at least 1."""
  most = max(1, elements // elements_a_query)
  return next(c for c in range(min(most, num_queries), 0, -1) if num_queries % c == 0)
