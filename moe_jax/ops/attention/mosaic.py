"""Hopper backend: which operands it takes, and its derivative. The kernels are in mosaic_*.py.

Forward keeps the output and the logarithm of each row's sum (base 2); backward computes the scores
again, once for dk and dv and once for dq: 7 products instead of the least possible 5, and in return
no sums over blocks in flight. The same operands give the same bits on every run.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_jax import sharding as sh
from moe_jax.ops.attention import mosaic_forward, mosaic_key_grads, mosaic_query_grads
from moe_jax.ops.attention.bounds import visible_bounds
from moe_jax.ops.attention.mosaic_common import in_eights, whole_tiles
from moe_jax.ops.backends import on_hopper

# B batch  S sequence  H query heads  G key-value heads  C key width  V value width


def _on_gpu() -> bool:
  # elsewhere this is the interpreter, which multiplies from shared memory only
  return jax.default_backend() == 'gpu'


def refusal(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
  """Why this backend cannot take these operands; None where it can."""
  C, V = q.shape[-1], v.shape[-1]
  if not on_hopper():
    return f'needs a Hopper GPU (compute capability 9.0), this is {jax.devices()[0].device_kind}'
  if q.dtype != jnp.bfloat16:
    return f'needs bfloat16 operands, got {q.dtype}'
  if q.shape[1] != k.shape[1]:
    return 'is used without a cache only'
  if C % 64 or V % 64 or V > C or C + V > 320:
    return (
      'needs widths that are multiples of 64, values no wider than keys, together at most 320 '
      f'(the registers of dk and dv), got {C} and {V}'
    )
  if q.shape[2] % k.shape[2]:
    return f'needs a multiple of {k.shape[2]} query heads, got {q.shape[2]}'
  return None


def attention(
  q_BSHC: Float[Array, 'B S H C'],
  k_BSGC: Float[Array, 'B S G C'],
  v_BSGV: Float[Array, 'B S G V'],
  segment_BS: Int[Array, 'B S'],
  sink_H: Float[Array, 'H'] | None = None,
  *,
  scale: float,
  window: int | None = None,
) -> tuple[Float[Array, 'B S H V'], Float[Array, 'B H S']]:
  """Output and logsumexp for queries and keys of the same tokens, on each device of the mesh."""

  def on_device(q, k, v, segment, *sink):
    S = q.shape[1]
    # the rows added are a document of their own
    first, end = visible_bounds(in_eights(segment, constant_values=-1), window)
    out: Any = _attend(scale, *map(in_eights, (q, k, v)), first, end, *sink)
    o, lse = out
    return o[:, :S], lse[:, :, :S]

  sink = () if sink_H is None else (sink_H.astype(jnp.float32),)
  operands = (q_BSHC, k_BSGC, v_BSGV, segment_BS, *sink)
  if not jax.sharding.get_abstract_mesh().explicit_axes:
    return on_device(*operands)
  return jax.shard_map(
    on_device,
    in_specs=(sh.HEADS, sh.HEADS, sh.HEADS, sh.TOKENS, *(sh.PER_HEAD for _ in sink)),
    out_specs=(sh.HEADS, sh.HEAD_ROWS),
    check_vma=False,  # the kernels carry no such types
  )(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q, k, v, first_BS, end_BS, sink_H=None):
  return _attend_forward(scale, q, k, v, first_BS, end_BS, sink_H)[0]


def _attend_forward(scale: float, q, k, v, first_BS, end_BS, sink_H=None):
  o, lse2 = mosaic_forward.forward(
    q, k, v, whole_tiles(first_BS), sink_H, scale=scale, in_registers=_on_gpu()
  )
  # for a remat policy to keep
  o, lse2 = checkpoint_name(o, 'attention_out'), checkpoint_name(lse2, 'attention_lse')
  lse = lse2[:, :, : q.shape[1]] * math.log(2)
  return (o, lse), (q, k, v, o, lse2, first_BS, end_BS, sink_H)


def _attend_backward(scale: float, kept, cotangents):
  q, k, v, o, lse2, first_BS, end_BS, sink_H = kept
  do, dlse = cotangents
  wide = lambda a: a.astype(jnp.float32)
  delta_BHS = jnp.swapaxes((wide(o) * wide(do)).sum(-1), 1, 2)
  dsink_H = None
  if sink_H is not None:
    p_sink_BHS = jnp.exp2(sink_H[:, None] / math.log(2) - lse2[:, :, : q.shape[1]])
    dsink_H = (p_sink_BHS * (dlse - delta_BHS)).sum((0, 2))
  operands = (q, k, v, do, lse2, whole_tiles(delta_BHS - dlse, mode='constant'))
  how = functools.partial(functools.partial, scale=scale, in_registers=_on_gpu())
  dk, dv = how(mosaic_key_grads.key_grads)(*operands, whole_tiles(end_BS))
  dq = how(mosaic_query_grads.query_grads)(*operands, whole_tiles(first_BS))
  return dq, dk, dv, None, None, dsink_H


_attend.defvjp(_attend_forward, _attend_backward)
