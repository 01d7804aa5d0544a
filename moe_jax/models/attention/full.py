"""Multi-head attention."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.config import FullAttentionConfig, RopeConfig
from moe_jax.models.attention.base import Cache, Where, append, cached_segments, rope_frequencies
from moe_jax.models.layers import matmul, matrix
from moe_jax.ops.attention import attention
from moe_jax.ops.rope import rotate_half_split, yarn_softmax_factor
from moe_jax.precision import Policy

# B batch  S new tokens  T cached tokens  D model  H heads  C head width


class FullAttention(nn.Module):
  """Multi-head attention with half-split rotary embeddings (DeepSeekMoE-16B)."""

  cfg: FullAttentionConfig
  rope: RopeConfig
  std: float
  eps: float
  policy: Policy

  @nn.compact
  def __call__(self, x_BSD: jax.Array, where: Where, cache: Cache | None):
    D, H, C = x_BSD.shape[-1], self.cfg.num_heads, self.cfg.d_head
    q_BSHC, k_BSHC, v_BSHC = (
      matmul(
        'bsd,dhc->bshc',
        x_BSD,
        matrix(self, f'{name}_DHC', (D, H, C), sh.HEADS_DHC, std=self.std),
        sh.HEADS_DHC,
        policy=self.policy,
      )
      for name in ('q', 'k', 'v')
    )
    out_HCD = matrix(self, 'out_HCD', (H, C, D), sh.HEADS_HCD, std=self.std)
    freq, magnitude = rope_frequencies(C, self.rope), self.rope.yarn_magnitude
    q_BSHC = rotate_half_split(q_BSHC, where.position_BS, freq) * magnitude
    k_BSHC = rotate_half_split(k_BSHC, where.position_BS, freq) * magnitude
    k_segment = q_segment = where.segment_BS
    if cache is not None:
      cache = append(cache, {'k_BTHC': k_BSHC, 'v_BTHC': v_BSHC}, where.start_B)
      k_BSHC, v_BSHC = (cache[n].astype(x_BSD.dtype) for n in ('k_BTHC', 'v_BTHC'))
      k_segment, q_segment = cached_segments(k_BSHC), jnp.ones_like(q_segment)
    scale = C**-0.5 * yarn_softmax_factor(self.rope.yarn_factor, self.rope.yarn_mscale_all_dim)
    o_BSHC = attention(q_BSHC, k_BSHC, v_BSHC, q_segment, k_segment, where.start_B, scale=scale)
    y_BSD = matmul(
      'bshc,hcd->bsd', o_BSHC, out_HCD, sh.HEADS_HCD, policy=self.policy, out=sh.STREAM
    )
    return y_BSD, cache, {}

  @staticmethod
  def empty_cache(cfg: FullAttentionConfig, batch: int, length: int, dtype: Any) -> Cache:
    shape = (batch, length, cfg.num_heads, cfg.d_head)
    return {n: jnp.zeros(shape, dtype, out_sharding=sh.HEADS) for n in ('k_BTHC', 'v_BTHC')}
