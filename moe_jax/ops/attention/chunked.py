"""Dense attention one block of queries at a time: scores never exceed [B, H, block, T].

Each block recomputes its scores in the backward pass, so memory is linear in the sequence. Time is
bound by reading and writing the scores; a fused kernel does better where there is one.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops.attention import reference

# B batch  S queries  T keys  H heads  C key width  V value width  N blocks  M queries a block


def attention(
  q_BSHC: Float[Array, 'B S H C'],
  k_BTHC: Float[Array, 'B T H C'],
  v_BTHV: Float[Array, 'B T H V'],
  q_segment_BS: Int[Array, 'B S'],
  k_segment_BT: Int[Array, 'B T'],
  start_B: Int[Array, 'B'],
  sink_H: Float[Array, 'H'] | None = None,
  *,
  scale: float,
  window: int | None = None,
  block: int = 512,
) -> tuple[Float[Array, 'B S H V'], Float[Array, 'B H S']]:
  """As `reference.attention_and_lse`; S must be a multiple of `block`."""
  num_blocks = q_BSHC.shape[1] // block

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def one_block(_: None, i: Array):
    q = jax.lax.dynamic_slice_in_dim(q_BSHC, i * block, block, axis=1)
    segment = jax.lax.dynamic_slice_in_dim(q_segment_BS, i * block, block, axis=1)
    mask = reference.visible(segment, k_segment_BT, start_B + i * block, window=window)
    return None, reference.attention_and_lse(q, k_BTHC, v_BTHV, mask, sink_H, scale=scale)

  _, (o_NBMHV, lse_NBHM) = jax.lax.scan(one_block, None, jnp.arange(num_blocks))
  o_BNMHV = jnp.moveaxis(o_NBMHV, 0, 1)
  lse_BHNM = jnp.moveaxis(lse_NBHM, 0, 2)
  B, S, H = q_BSHC.shape[:3]
  return o_BNMHV.reshape(B, S, H, -1), lse_BHNM.reshape(B, H, S)
