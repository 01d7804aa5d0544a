"""Hopper backend: which shapes it takes, and the backward pass put together from its kernels.

The gradient of the latents, without atomics: for some queries at a time, p and ds go to device
memory in bfloat16; one batched matmul makes the row that each (query, key) pair adds to its key,
summed over all heads; and each key's rows are summed in float32 in the order of the queries. A
pair costs 1152 bytes written and read, a quarter of what float32 atomics of 64 heads at a time
would, and the result is the same bit for bit.
"""

# T queries  H heads  R rows (T*H)  V latent (value) width  C rope width  X both  S keys
# K slots of a query  N queries or parts of them  P 2H; in a chunk, C is its queries

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops import row_sums
from moe_jax.ops.backends import on_hopper
from moe_jax.ops.sparse_mla import mosaic_backward, mosaic_forward, mosaic_mass
from moe_jax.ops.sparse_mla.mosaic_forward import Keys

# of p, ds and the pairs' rows, together
_CHUNK_BYTES = 4 * 2**30


def unsupported(dtype: jnp.dtype, num_heads: int, value_width: int, rope_width: int) -> str | None:
  """Why these kernels cannot run here, in one line, or None if they can."""
  if not on_hopper():
    return f'needs a Hopper GPU (compute capability 9.0), this is {jax.devices()[0].device_kind}'
  heads = mosaic_forward.HEADS
  if dtype != jnp.bfloat16:
    return f'needs bfloat16, got {dtype}'
  if num_heads % heads and (num_heads > heads or num_heads % 8):
    return f'needs 8 to 64 heads in eights, or a multiple of 64, got {num_heads}'
  if value_width not in (128, 512) or rope_width != mosaic_forward.ROPE:
    return f'needs latents of 128 or 512 and rope keys of 64, got {value_width} and {rope_width}'
  return None


def forward(
  q_THV: jax.Array,
  q_rope_THC: jax.Array,
  keys: Keys,
  *,
  scale: float,
  splits: int = 1,
  native: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Outputs [N, H, V] and natural logsumexp [N, H]; N = T without splits."""
  (_, H, V), N = q_THV.shape, keys.count_N.shape[0]
  o_RV, lse_R = mosaic_forward.attend(
    _flat(q_THV), _flat(q_rope_THC), keys, splits=splits, scale=scale, native=native
  )
  lse_NH = jnp.where(keys.count_N[:, None] > 0, lse_R.reshape(N, H) * math.log(2), -1e30)
  return o_RV.reshape(N, H, V), lse_NH


def key_mass(
  q_THV: jax.Array,
  q_rope_THC: jax.Array,
  keys: Keys,
  lse_TH: jax.Array,
  *,
  scale: float,
  native: bool = True,
) -> jax.Array:
  """[T, K], summed over heads; undefined at and after count."""
  lse_R = _flat(lse_TH) * math.log2(math.e)
  q = _flat(q_THV), _flat(q_rope_THC)
  return mosaic_mass.mass(*q, keys, lse_R, scale=scale, native=native).sum(1)


def _flat(a_TH: jax.Array) -> jax.Array:
  return a_TH.reshape(a_TH.shape[0] * a_TH.shape[1], *a_TH.shape[2:])


def chunk_size(num_queries: int, num_slots: int, num_heads: int, width: int) -> int:
  """Queries of which the backward pass keeps p, ds and the pairs' rows at a time."""
  bytes_a_query = num_slots * (2 * num_heads + width) * 2
  # 32-bit addresses of the pairs' rows
  most = max(1, min(_CHUNK_BYTES // bytes_a_query, (2**31 - 1) // (num_slots * width)))
  return next(c for c in range(min(most, num_queries), 0, -1) if num_queries % c == 0)


class Gradients(NamedTuple):
  q_THV: jax.Array
  q_rope_THC: jax.Array
  # float32
  latent_SV: jax.Array
  rope_SC: jax.Array


def backward(
  q_THV: jax.Array,
  q_rope_THC: jax.Array,
  keys: Keys,
  lse_TH: jax.Array,
  delta_TH: jax.Array,
  do_THV: jax.Array,
  *,
  scale: float,
  chunk: int | None = None,
  native: bool = True,
) -> Gradients:
  """delta is the sum of o * do over its columns, less the logsumexp's own gradient."""
  (T, H, V), (S, C), K = q_THV.shape, keys.rope_SC.shape, keys.row.shape[1]
  size = chunk or chunk_size(T, K, H, V + C)
  slot_K = jnp.arange(K)

  def one_chunk(totals, args):
    q, q_rope, do, index, count, lse, delta = args
    named = Keys(keys.latent_SV, keys.rope_SC, index, count)
    p_ds_CPK = mosaic_backward.probabilities(
      _flat(q),
      _flat(q_rope),
      _flat(do),
      named,
      _flat(lse) * math.log2(math.e),
      _flat(delta),
      scale=scale,
      native=native,
    )
    dq_RV, dq_rope_RC = mosaic_backward.query_gradient(p_ds_CPK, named, native=native)
    rope = jnp.concatenate([jnp.zeros((size, H, C), q.dtype), q_rope], axis=1)
    do_q_CPX = jnp.concatenate([jnp.concatenate([do, q], axis=1), rope], axis=2)
    pair_CKX = jnp.einsum('cpk,cpx->ckx', p_ds_CPK, do_q_CPX, preferred_element_type=q.dtype)
    key_CK = jnp.where(slot_K < count[:, None], index, S)
    order, start = row_sums.inverse(key_CK.reshape(-1), S)
    totals = row_sums.add_rows(totals, pair_CKX.reshape(size * K, V + C), order, start)
    return totals, (dq_RV.reshape(size, H, V), dq_rope_RC.reshape(size, H, C))

  split = lambda a: a.reshape(T // size, size, *a.shape[1:])
  args = q_THV, q_rope_THC, do_THV, keys.row, keys.count_N, lse_TH, delta_TH
  zeros = jnp.zeros((S, V + C), jnp.float32)
  dkv_SX, dq = jax.lax.scan(one_chunk, zeros, tuple(map(split, args)))
  dq_THV, dq_rope_THC = (a.reshape(T, H, -1) for a in dq)
  return Gradients(dq_THV, dq_rope_THC, dkv_SX[:, :V], dkv_SX[:, V:])
