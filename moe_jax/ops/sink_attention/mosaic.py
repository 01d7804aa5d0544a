"""Hopper backend: what it takes, and the forward and backward kernels joined into one function."""

# B batch  S queries  N entries  H heads  C width  K index slots  T queries of all rows (B*S)
# R tokens, then entries, of all rows  U queries of a chunk  J slots of a query  X places of sums

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.ops.backends import on_hopper
from moe_jax.ops.row_sums import add_rows, add_runs, inverse
from moe_jax.ops.sink_attention import (
  mosaic_backward,
  mosaic_forward,
  mosaic_gather,
  mosaic_mass,
  mosaic_plan,
)
from moe_jax.ops.sink_attention.mosaic_forward import LOG2E
from moe_jax.ops.sink_attention.spans import Spans

_BLOCK = mosaic_gather.BLOCK
# of what queries add to the gradients of their rows, held at a time
_CHUNK_BYTES = 3 << 30
_PIECES = 16


def unsupported(
  q_BSHC: jax.Array, key_BSC: jax.Array, index_BSK: jax.Array | None = None
) -> str | None:
  """Why these kernels cannot run here, in one line, or None if they can."""
  if not on_hopper():
    return f'needs a Hopper GPU (compute capability 9.0), this is {jax.devices()[0].device_kind}'
  H, C = jax.typeof(q_BSHC).sharding.shard_shape(q_BSHC.shape)[2:]
  if C != mosaic_gather.WIDTH:
    return f'needs heads of width {mosaic_gather.WIDTH} (a warpgroup copies such rows), got {C}'
  if H % mosaic_plan.HEADS:
    return f'needs a multiple of {mosaic_plan.HEADS} heads on a device, got {H}'
  if q_BSHC.dtype != jnp.bfloat16 or key_BSC.dtype != jnp.bfloat16:
    return f'needs bfloat16, got {q_BSHC.dtype} and {key_BSC.dtype}'
  if index_BSK is not None and index_BSK.shape[-1] % _BLOCK:
    return f'needs a multiple of {_BLOCK} slots in the index, got {index_BSK.shape[-1]}'
  return None


def attention(
  q_BSHC: jax.Array,
  key_BSC: jax.Array,
  entry_BNC: jax.Array,
  sink_H: jax.Array,
  seen: Spans,
  index_BSK: jax.Array | None,
  *,
  window: int,
  scale: float,
  native: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """On one device: outputs [B, S, H, C] and the base-2 logsumexp [B, S, H], without a gradient."""
  B, S, H, C = q_BSHC.shape
  run_T4, row_RC, index_M = _flat(key_BSC, entry_BNC, seen, index_BSK)
  slots = index_BSK.shape[-1] if index_BSK is not None else _round_up(entry_BNC.shape[1])
  out: Any = _attend(
    (_round_up(window), slots, scale, native),
    q_BSHC.reshape(B * S, H, C), row_RC, sink_H.astype(jnp.float32), run_T4, index_M,
  )  # fmt: skip
  o_THC, lse_TH = out
  return o_THC.reshape(B, S, H, C), lax.stop_gradient(lse_TH).reshape(B, S, H)


def mass(
  q_BSHC: jax.Array,
  entry_BNC: jax.Array,
  lse_BSH: jax.Array,
  seen: Spans,
  index_BSK: jax.Array,
  *,
  scale: float,
  native: bool = True,
) -> jax.Array:
  """On one device: float32 [B, S, K], the attention that entries got, summed over heads."""
  B, S, H, C = q_BSHC.shape
  run_T4, row_RC, index_M = _flat(entry_BNC[:, :0], entry_BNC, seen, index_BSK)
  assert index_M is not None
  out_GTK = mosaic_mass.mass(
    q_BSHC.reshape(B * S, H, C), row_RC, run_T4.at[:, 1].set(0), index_M,
    lse_BSH.reshape(B * S, H), scale=scale, native=native,
  )  # fmt: skip
  used_BSK = jnp.arange(index_BSK.shape[-1]) < seen.entry_count_BS[..., None]
  return jnp.where(used_BSK, out_GTK.sum(0).reshape(index_BSK.shape), 0)


def _flat(
  key_BTC: jax.Array, entry_BNC: jax.Array, seen: Spans, index_BSK: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Runs of all queries over the tokens, then the entries, of all rows; those; and the index."""
  (B, S), (T, C), N = seen.window_first_BS.shape, key_BTC.shape[1:], entry_BNC.shape[1]
  row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
  token_row_B1, entry_row_B1 = row_B1 * T, B * T + row_B1 * N
  entry_first_BS, entry_count_BS = seen.entry_first_BS + entry_row_B1, seen.entry_count_BS
  index_M = None
  if index_BSK is not None:
    entry_first_BS = jnp.broadcast_to(entry_row_B1, (B, S))
    entry_count_BS = jnp.minimum(entry_count_BS, index_BSK.shape[-1])
    index_M = index_BSK.astype(jnp.int32).reshape(-1)
  window_first_BS = seen.window_first_BS + token_row_B1
  run = (window_first_BS, seen.window_count_BS, entry_first_BS, entry_count_BS)
  run_T4 = jnp.stack(run, axis=-1).astype(jnp.int32).reshape(B * S, 4)
  return run_T4, jnp.concatenate([key_BTC.reshape(-1, C), entry_BNC.reshape(-1, C)]), index_M


def _round_up(n: int) -> int:
  return -(-n // _BLOCK) * _BLOCK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  sizes: tuple[int, int, float, bool],
  q_THC: jax.Array,
  row_RC: jax.Array,
  sink_H: jax.Array,
  run_T4: jax.Array,
  index_M: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  _, _, scale, native = sizes
  return mosaic_forward.forward(q_THC, row_RC, sink_H, run_T4, index_M, scale=scale, native=native)


def _attend_forward(sizes, *args):
  out: Any = _attend(sizes, *args)
  return out, (*args, *out)


def _attend_backward(sizes, kept, cotangents):
  window_slots, entry_slots, scale, native = sizes
  q_THC, row_RC, sink_H, run_T4, index_M, o_THC, lse_TH = kept
  do_THC = cotangents[0]
  (T, H, C), R, J = q_THC.shape, row_RC.shape[0], window_slots + entry_slots
  head_blocks = H // mosaic_plan.HEADS
  delta_TH = (o_THC.astype(jnp.float32) * do_THC.astype(jnp.float32)).sum(-1)
  dsink_H = -(jnp.exp2(sink_H * LOG2E - lse_TH) * delta_TH).sum(0)

  most = max(1, min(T, _CHUNK_BYTES // (head_blocks * J * C * 2)))
  # without a remainder dq is whole when the chunks are done
  U = next((u for u in range(most, most // 2, -1) if T % u == 0), most)
  num_chunks = -(-T // U)
  # queries past the last have no keys
  padded = lambda a: jnp.pad(a, ((0, num_chunks * U - T), *((0, 0),) * (a.ndim - 1)))
  run_QUx4 = padded(run_T4).reshape(num_chunks, U, 4)
  index_QUxK = (
    None if index_M is None else padded(index_M.reshape(T, -1)).reshape(num_chunks, U, -1)
  )

  entries, listed = R - T, index_M is not None
  token_seen_by = _seen_by(run_T4[:, :2], jnp.arange(T, dtype=jnp.int32))
  entry_seen_by = _seen_by(run_T4[:, 2:], T + jnp.arange(entries, dtype=jnp.int32))

  def chunk(totals, at):
    token_PTC, entry_PEC = totals
    first, run_U4, index_UK = at
    dq_UHC, part_GMC = mosaic_backward.backward(
      first[None], q_THC, do_THC, row_RC, run_T4, index_M, lse_TH, delta_TH,
      queries=U, slots=J, window_slots=window_slots, scale=scale, native=native,
    )  # fmt: skip
    part_GUJC = part_GMC.reshape(head_blocks, U, J, C)
    here = lambda seen_by: (jnp.clip(a - first, 0, U) for a in seen_by)
    token_PTC = add_runs(token_PTC, part_GUJC, run_U4[:, 0], *here(token_seen_by), base=0)
    if not entries:
      return (token_PTC, entry_PEC), dq_UHC
    if index_UK is None:
      entry_PEC = add_runs(
        entry_PEC, part_GUJC, run_U4[:, 2] - T, *here(entry_seen_by), base=window_slots
      )
      return (token_PTC, entry_PEC), dq_UHC
    slot_K = jnp.arange(entry_slots)
    entry_UK = jnp.where(slot_K < run_U4[:, 3:], run_U4[:, 2:3] - T + index_UK, entries)
    order_M, begin = inverse(jnp.tile(entry_UK.reshape(-1), head_blocks), entries)
    row_M = order_M // entry_slots * J + window_slots + order_M % entry_slots
    entry_EC = add_rows(entry_PEC[0], part_GMC.reshape(-1, C), row_M, begin)
    return (token_PTC, entry_EC[None]), dq_UHC

  starts = jnp.arange(num_chunks, dtype=jnp.int32) * U
  # an entry that most queries see is summed by several programs
  zeros = jnp.zeros((1, T, C), jnp.float32), jnp.zeros((1 if listed else _PIECES, entries, C))
  (token_PTC, entry_PEC), dq_QUHC = lax.scan(chunk, zeros, (starts, run_QUx4, index_QUxK))
  total_RC = jnp.concatenate([token_PTC.sum(0), entry_PEC.sum(0)])
  dq_THC = dq_QUHC.reshape(num_chunks * U, H, C)[:T]
  none = lambda a: None if a is None else np.zeros(a.shape, jax.dtypes.float0)
  return dq_THC, total_RC.astype(row_RC.dtype), dsink_H, none(run_T4), none(index_M)


def _seen_by(run_T2: jax.Array, key_S: jax.Array) -> tuple[jax.Array, ...]:
  """The first query that sees each key, and the one behind the last, by first key and count."""
  find = lambda a: jnp.searchsorted(a, key_S, side='right').astype(jnp.int32)
  return find(run_T2.sum(1)), find(run_T2[:, 0])


_attend.defvjp(_attend_forward, _attend_backward)
