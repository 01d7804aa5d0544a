"""Attention of new tokens over V4's caches: a window of keys, and compressed entries.

Hopper: the kernel of whole rows (ops/sink_attention) reads both caches where they lie, the window
in one call and the entries, cut into parts when there are few queries, in another. Results are
joined by their logsumexp, and only there the sink comes in.
"""

# B rows  S new tokens  T window and new tokens  N entries  H heads  C head width
# K slots of a query  Q queries (B*S)  P parts of a query's keys

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops import backends
from moe_jax.ops.decode_attention.parts import consecutive, listed, num_parts
from moe_jax.ops.sink_attention import Spans, mosaic, sink_attention, visible
from moe_jax.ops.sink_attention.mosaic_forward import LOG2E, forward

# of the softmax's logarithm, base 2, where there is no key
_NOTHING = -1e30


def compressed_decode_attention(
  q_BSHC: Float[Array, 'B S H C'],
  key_BTC: Float[Array, 'B T C'],
  entry_BNC: Float[Array, 'B N C'],
  sink_H: Float[Array, 'H'],
  seen: Spans,
  index_BSK: Int[Array, 'B S K'] | None = None,
  *,
  scale: float,
  implementation: str | None = None,
  native: bool = True,
) -> Float[Array, 'B S H C']:
  """Float32 softmax over a window, entries and the sink, q's dtype out. No gradient with 'mosaic'.

  Args:
    entry_BNC: N may be 0. What lies behind a query's entries must be finite.
    seen: what each query sees, by index in `key_BTC` and in `entry_BNC`; of the window at least
      one key.
    index_BSK: the entries that a query sees, in its first K or `entry_count` slots; None: all of
      its run.
    implementation: 'mosaic' or 'reference', which then runs or raises NotImplementedError with the
      reason. None takes the fastest that can.
    native: False in the interpreter.

  Source: arXiv:2606.19348, section 2.2.
  """
  problem = mosaic.unsupported(q_BSHC, key_BTC) if native else None
  op = 'compressed_decode_attention'
  if backends.choose(op, implementation, problem, fallback='reference') == 'reference':
    masks = visible(seen, entry_BNC.shape[1], index_BSK, num_tokens=key_BTC.shape[1])
    both_BTC = jnp.concatenate([key_BTC, entry_BNC], axis=1)
    mask_BST = jnp.concatenate(masks, axis=-1)
    return sink_attention(q_BSHC, both_BTC, sink_H, mask_BST, scale=scale)[0]

  def attend(row_RC: jax.Array, first_QP: jax.Array, count_QP: jax.Array, index=None):
    """Outputs [Q, P, H, C] and their base-2 logsumexp [Q, P, H]."""
    Q, P = first_QP.shape
    q = jnp.repeat(q_BSHC.reshape(Q, *q_BSHC.shape[2:]), P, axis=0)
    none = jnp.zeros_like(first_QP)
    # the kernel wants a key for every query
    run_QP4 = jnp.stack([none, none, first_QP, jnp.maximum(count_QP, 1)], axis=-1)
    run = run_QP4.astype(jnp.int32).reshape(-1, 4)
    no_sink_H = jnp.full(sink_H.shape, _NOTHING / LOG2E, jnp.float32)
    o, lse = forward(q, row_RC, no_sink_H, run, index, scale=scale, native=native)
    lse_QPH = jnp.where(count_QP[..., None] > 0, lse.reshape(Q, P, -1), _NOTHING)
    return o.reshape(Q, P, *o.shape[1:]), lse_QPH

  (B, S, H, C), T, N = q_BSHC.shape, key_BTC.shape[1], entry_BNC.shape[1]
  row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
  flat = lambda a_BS: a_BS.reshape(B * S, 1)
  window = flat(row_B1 * T + seen.window_first_BS), flat(seen.window_count_BS)
  results = [attend(key_BTC.reshape(B * T, C), *window)]
  if N:
    row_RC, row_first_Q1 = entry_BNC.reshape(B * N, C), flat(jnp.broadcast_to(row_B1 * N, (B, S)))
    count_Q1 = flat(seen.entry_count_BS)
    if index_BSK is None:
      parts = num_parts(B * S, H, N)
      first_Q1 = row_first_Q1 + flat(seen.entry_first_BS)
      run = consecutive(first_Q1[:, 0], count_Q1[:, 0], parts)
      results.append(attend(row_RC, *(a.reshape(B * S, parts) for a in run)))
    else:
      K = index_BSK.shape[-1]
      parts = num_parts(B * S, H, K)
      count_Q = jnp.minimum(count_Q1[:, 0], K)
      index, count_QP = listed(index_BSK.reshape(B * S, K), count_Q, parts)
      first_QP = jnp.broadcast_to(row_first_Q1, (B * S, parts))
      results.append(attend(row_RC, first_QP, count_QP, index.astype(jnp.int32).reshape(-1)))
  o_QPHC, lse_QPH = (jnp.concatenate(a, axis=1) for a in zip(*results, strict=True))
  sink_QPH = jnp.broadcast_to(sink_H.astype(jnp.float32) * LOG2E, (B * S, 1, H))
  weight_QPH = jax.nn.softmax(jnp.concatenate([lse_QPH, sink_QPH], axis=1) / LOG2E, axis=1)[:, :-1]
  o_QHC = jnp.einsum('qphc,qph->qhc', o_QPHC.astype(jnp.float32), weight_QPH)
  return o_QHC.astype(q_BSHC.dtype).reshape(q_BSHC.shape)
