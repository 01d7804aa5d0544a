"""Dense attention by cuDNN's fused kernel, forward and backward, on each device of the mesh.

cuDNN wants keys and values of one width: narrower values are padded with zeros, which costs their
share of the second product. Document borders go in as a mask of [B, 1, S, S] in the compute dtype,
the only part that grows with the square of the sequence.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax import sharding as sh

# B batch  S sequence  H heads  C key width  V value width

_LARGEST_WIDTH = 256


def refusal(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
  """Why this backend cannot take these operands; None where it can."""
  if jax.default_backend() != 'gpu':
    return 'cuDNN needs a GPU'
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f'cuDNN needs 16-bit operands, not {q.dtype}'
  if q.shape[1] != k.shape[1]:
    return 'cuDNN is used without a cache only'
  if v.shape[-1] > q.shape[-1] or q.shape[-1] > _LARGEST_WIDTH or q.shape[-1] % 8:
    return f'cuDNN cannot take widths {q.shape[-1]} and {v.shape[-1]}'
  return None


def attention(
  q_BSHC: Float[Array, 'B S H C'],
  k_BSHC: Float[Array, 'B S H C'],
  v_BSHV: Float[Array, 'B S H V'],
  segment_BS: Int[Array, 'B S'],
  *,
  scale: float,
) -> Float[Array, 'B S H V']:
  """As `reference.attention` for queries and keys of the same tokens."""
  C, V = q_BSHC.shape[-1], v_BSHV.shape[-1]

  def on_device(q, k, v, segment):
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, C - V)))
    mask_B1SS = (segment[:, :, None] == segment[:, None, :])[:, None]
    o = jax.nn.dot_product_attention(
      q, k, v, mask=mask_B1SS, scale=scale, is_causal=True, implementation='cudnn'
    )
    return o[..., :V]

  operands = q_BSHC, k_BSHC, v_BSHV, segment_BS
  if not jax.sharding.get_abstract_mesh().explicit_axes:
    return on_device(*operands)
  return jax.shard_map(
    on_device, in_specs=(sh.HEADS, sh.HEADS, sh.HEADS, sh.TOKENS), out_specs=sh.HEADS,
    check_vma=False,  # cuDNN's custom calls carry no such types
  )(*operands)  # fmt: skip
