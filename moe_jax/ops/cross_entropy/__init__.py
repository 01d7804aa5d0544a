"""Next-token loss from the last hidden state, without holding all logits at once.

A chunk of positions at a time: logits, their loss, and in the same pass its gradient, so that each
logit is computed once. The gradient of a sum of losses is known but for one factor, the cotangent
of the sum, which the backward pass multiplies by.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax import sharding as sh

# logits that a device holds at once, in float32
CHUNK_BYTES = 2**30

# B batch  S sequence  T positions of one device  D model  V vocabulary  N chunks  M positions a
# chunk

_HEAD_DV = jax.P(None, sh.MODEL)


def token_losses(
  hidden_BSD: Float[Array, 'B S D'], head_DV: Float[Array, 'D V'], target_BS: Int[Array, 'B S']
) -> Float[Array, 'B S']:
  """-log softmax(hidden head)[target] of every position, float32: the definition."""
  logits_BSV = jnp.einsum('bsd,dv->bsv', hidden_BSD, head_DV, preferred_element_type=jnp.float32)
  # a masked sum, not an index: it also works where `model` splits the vocabulary
  hit_BSV = jnp.arange(head_DV.shape[1]) == target_BS[..., None]
  return jax.nn.logsumexp(logits_BSV, axis=-1) - jnp.where(hit_BSV, logits_BSV, 0).sum(-1)


def total_loss(
  hidden_BSD: Float[Array, 'B S D'],
  head_DV: Float[Array, 'D V'],
  target_BS: Int[Array, 'B S'],
  mask_BS: Bool[Array, 'B S'],
  *,
  chunk: int | None = None,
) -> Float[Array, '']:
  """Sum of the losses where `mask_BS` is true, in nats.

  Operands of the products are of hidden's dtype, logits and sums float32. Gradients reach hidden
  and head; differentiating twice is not possible.

  Args:
    hidden_BSD, target_BS, mask_BS: split by row over (data, expert) where there is a mesh.
    head_DV: its vocabulary split over `model`, or whole.
    chunk: most positions at a time on a device; by default what CHUNK_BYTES of logits allow.
  """
  return _total_loss(chunk, hidden_BSD, head_DV, target_BS, mask_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total_loss(chunk, hidden_BSD, head_DV, target_BS, mask_BS):
  return _over_mesh(_loss, chunk, hidden_BSD, head_DV, target_BS, mask_BS, outs=(jax.P(),))[0]


def _forward(chunk, hidden_BSD, head_DV, target_BS, mask_BS):
  outs = (jax.P(), sh.STREAM, _HEAD_DV)
  loss, dhidden_BSD, dhead_DV = _over_mesh(
    _loss_and_gradients, chunk, hidden_BSD, head_DV, target_BS, mask_BS, outs=outs
  )
  # an empty array carries the dtype of the head to the backward pass
  return loss, (dhidden_BSD, dhead_DV, jnp.zeros((0,), head_DV.dtype))


def _backward(chunk, kept, dloss):
  dhidden_BSD, dhead_DV, like = kept
  no_gradient = lambda dtype: np.zeros(dhidden_BSD.shape[:2], dtype)
  return (
    (dhidden_BSD * dloss).astype(dhidden_BSD.dtype),
    (dhead_DV * dloss).astype(like.dtype),
    no_gradient(jax.dtypes.float0),
    no_gradient(jax.dtypes.float0),
  )


_total_loss.defvjp(_forward, _backward)


def _over_mesh(body, chunk, hidden_BSD, head_DV, target_BS, mask_BS, *, outs):
  """`body` on every device's rows and share of the vocabulary; on arrays as they are without a
  mesh."""
  body = functools.partial(body, chunk)
  args = (hidden_BSD, head_DV, target_BS, mask_BS)
  if jax.sharding.get_abstract_mesh().empty:
    return body(*args, split=False)
  return jax.shard_map(
    functools.partial(body, split=True),
    in_specs=(sh.STREAM, _HEAD_DV, sh.TOKENS, sh.TOKENS),
    out_specs=outs,
  )(*args)


def _loss(chunk, hidden_BSD, head_DV, target_BS, mask_BS, *, split):
  head_DV = head_DV.astype(hidden_BSD.dtype)

  def one_chunk(total, part):
    _, losses_M, _, _ = _losses(head_DV, *part[:2], split=split)
    return total + jnp.where(part[2], losses_M, 0).sum(), None

  zero = _varying(jnp.zeros((), jnp.float32), sh.BATCH, split)
  total, _ = _each_chunk(one_chunk, zero, chunk, hidden_BSD, head_DV, target_BS, mask_BS)
  return (_sum(total, sh.BATCH, split),)


def _loss_and_gradients(chunk, hidden_BSD, head_DV, target_BS, mask_BS, *, split):
  head_DV = head_DV.astype(hidden_BSD.dtype)

  def one_chunk(carry, part):
    total, dhead_DV = carry
    hidden_MD, target_M, mask_M = part
    logits_MV, losses_M, lse_M, hit_MV = _losses(head_DV, hidden_MD, target_M, split=split)
    total += jnp.where(mask_M, losses_M, 0).sum()
    dlogits_MV = jnp.exp(logits_MV - lse_M[:, None]) - hit_MV
    dlogits_MV = jnp.where(mask_M[:, None], dlogits_MV, 0).astype(hidden_MD.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dhead_DV += product('md,mv->dv', hidden_MD, dlogits_MV)
    dhidden_MD = _sum(product('mv,dv->md', dlogits_MV, head_DV), sh.MODEL, split)
    return (total, dhead_DV), dhidden_MD.astype(hidden_MD.dtype)

  total = _varying(jnp.zeros((), jnp.float32), sh.BATCH, split)
  dhead_DV = _varying(jnp.zeros(head_DV.shape, jnp.float32), (*sh.BATCH, sh.MODEL), split)
  (total, dhead_DV), dhidden = _each_chunk(
    one_chunk, (total, dhead_DV), chunk, hidden_BSD, head_DV, target_BS, mask_BS
  )
  dhidden_BSD = dhidden.reshape(hidden_BSD.shape)
  return _sum(total, sh.BATCH, split), dhidden_BSD, _sum(dhead_DV, sh.BATCH, split)


def _each_chunk(one_chunk, carry, chunk, hidden_BSD, head_DV, target_BS, mask_BS):
  """Scans `one_chunk` over the positions, as many at a time as `chunk` or CHUNK_BYTES allow."""
  D, T = hidden_BSD.shape[-1], target_BS.size
  parts = (hidden_BSD.reshape(T, D), target_BS.reshape(T), mask_BS.reshape(T))
  num = num_chunks(T, chunk or max(CHUNK_BYTES // (4 * head_DV.shape[1]), 1))
  if num == 1:
    return one_chunk(carry, parts)
  split = lambda a: a.reshape(num, T // num, *a.shape[1:])
  return jax.lax.scan(one_chunk, carry, jax.tree.map(split, parts))


def num_chunks(positions: int, most: int) -> int:
  """Equal chunks of at most `most` positions."""
  return next(n for n in range(1, positions + 1) if positions % n == 0 and positions // n <= most)


def _losses(head_DV, hidden_MD, target_M, *, split):
  """Logits [M, V], losses [M], log of the sum of exponentials [M], where the target is [M, V]."""
  logits_MV = jnp.einsum('md,dv->mv', hidden_MD, head_DV, preferred_element_type=jnp.float32)
  V = head_DV.shape[1]
  first = jax.lax.axis_index(sh.MODEL) * V if split else 0
  hit_MV = first + jnp.arange(V) == target_M[:, None]
  max_M, sum_M = _exponentials(logits_MV)
  if split:
    most_M = jax.lax.pmax(max_M, sh.MODEL)
    sum_M = jax.lax.psum(sum_M * jnp.exp(max_M - most_M), sh.MODEL)
    max_M = most_M
  lse_M = max_M + jnp.log(sum_M)
  hit_logit_M = _sum(jnp.where(hit_MV, logits_MV, 0).sum(-1), sh.MODEL, split)
  return logits_MV, lse_M - hit_logit_M, lse_M, hit_MV


def _exponentials(logits_MV):
  """Largest logit [M] and the sum of exp(logit - largest) [M], of one reading of the logits."""

  def join(a, b):
    (max_a, sum_a), (max_b, sum_b) = a, b
    most = jnp.maximum(max_a, max_b)
    return most, sum_a * jnp.exp(max_a - most) + sum_b * jnp.exp(max_b - most)

  # not infinity, of which two would differ by NaN
  least = np.float32(np.finfo(np.float32).min)
  start = (least, np.float32(0))
  return jax.lax.reduce((logits_MV, jnp.ones_like(logits_MV)), start, join, (1,))


def _sum(a, axes, split):
  return jax.lax.psum(a, axes) if split else a


def _varying(a, axes, split):
  return jax.lax.pcast(a, axes, to='varying') if split else a
