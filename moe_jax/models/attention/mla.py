"""Multi-head latent attention."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.config import MLAConfig, RopeConfig
from moe_jax.models.attention.base import Cache, Where, append, cached_segments, rope_frequencies
from moe_jax.models.layers import RMSNorm, matmul, weight
from moe_jax.ops.attention import attention, latent_attention, visible
from moe_jax.ops.rope import rotate_adjacent, yarn_softmax_factor
from moe_jax.precision import Policy

# B batch  S new tokens  T cached tokens  D model  H heads  N nope width  C rope width  V value
# width R key-value latent width  Q query latent width

# the published code keeps this in the latent norms whatever rms_norm_eps is
_LATENT_EPS = 1e-6


class MLA(nn.Module):
  """Multi-head latent attention; expanded for training, on the latents when there is a cache.

  Source: arXiv:2405.04434, section 2.1.
  """

  cfg: MLAConfig
  rope: RopeConfig
  std: float
  eps: float
  policy: Policy

  @nn.compact
  def __call__(self, x_BSD: jax.Array, where: Where, cache: Cache | None):
    c, D, R = self.cfg, x_BSD.shape[-1], self.cfg.kv_rank
    H, N, C, V = c.num_heads, c.d_nope, c.d_rope, c.d_value
    kv_DX = weight(self, 'kv_down_DX', (D, R + C), sh.MATRIX_DX, std=self.std)
    key_RHN = weight(self, 'key_up_RHN', (R, H, N), sh.HEADS_DHC, std=self.std)
    value_RHV = weight(self, 'value_up_RHV', (R, H, V), sh.HEADS_DHC, std=self.std)
    out_HVD = weight(self, 'out_HVD', (H, V, D), sh.HEADS_HCD, std=self.std)
    freq, magnitude = rope_frequencies(C, self.rope), self.rope.yarn_magnitude
    scale = (N + C) ** -0.5 * yarn_softmax_factor(
      self.rope.yarn_factor, self.rope.yarn_mscale_all_dim
    )

    q_BSHN, q_BSHC = jnp.split(self._queries(x_BSD), [N], axis=-1)
    q_BSHC = rotate_adjacent(q_BSHC, where.position_BS, freq) * magnitude
    kv_BSX = matmul('bsd,dx->bsx', x_BSD, kv_DX, sh.MATRIX_DX, policy=self.policy)
    latent_BSR = RMSNorm(_LATENT_EPS, name='kv_norm')(kv_BSX[..., :R])
    rope_BSC = rotate_adjacent(kv_BSX[..., None, R:], where.position_BS, freq)[:, :, 0] * magnitude

    def up(equation: str, a: jax.Array, w: jax.Array) -> jax.Array:
      return matmul(equation, a, w, sh.HEADS_DHC, policy=self.policy)

    if cache is None:
      k_BSHN = up('bsr,rhn->bshn', latent_BSR, key_RHN)
      v_BSHV = up('bsr,rhv->bshv', latent_BSR, value_RHV)
      shared_BSHC = jnp.broadcast_to(
        rope_BSC[:, :, None], q_BSHC.shape, out_sharding=jax.typeof(q_BSHC).sharding
      )
      o_BSHV = attention(
        jnp.concatenate([q_BSHN, q_BSHC], -1),
        jnp.concatenate([k_BSHN, shared_BSHC], -1),
        v_BSHV,
        where.segment_BS,
        where.segment_BS,
        where.start_B,
        scale=scale,
      )
    else:
      cache = append(cache, {'latent_BTR': latent_BSR, 'rope_BTC': rope_BSC}, where.start_B)
      latent_BTR, rope_BTC = (cache[n].astype(x_BSD.dtype) for n in ('latent_BTR', 'rope_BTC'))
      ones_BS = jnp.ones_like(where.segment_BS)
      visible_BST = visible(ones_BS, cached_segments(latent_BTR), where.start_B)
      q_BSHR = up('bshn,rhn->bshr', q_BSHN, key_RHN)
      o_BSHR = latent_attention(q_BSHR, q_BSHC, latent_BTR, rope_BTC, visible_BST, scale=scale)
      o_BSHV = up('bshr,rhv->bshv', o_BSHR, value_RHV)
    y_BSD = matmul(
      'bshv,hvd->bsd', o_BSHV, out_HVD, sh.HEADS_HCD, policy=self.policy, out=sh.STREAM
    )
    return y_BSD, cache, {}

  def _queries(self, x_BSD: jax.Array) -> jax.Array:
    c, D = self.cfg, x_BSD.shape[-1]
    if c.q_rank:
      down_DQ = weight(self, 'q_down_DQ', (D, c.q_rank), sh.MATRIX_DX, std=self.std)
      x_BSD = matmul('bsd,dq->bsq', x_BSD, down_DQ, sh.MATRIX_DX, policy=self.policy)
      x_BSD = RMSNorm(_LATENT_EPS, name='q_norm')(x_BSD)
    shape = (x_BSD.shape[-1], c.num_heads, c.d_nope + c.d_rope)
    up_QHX = weight(self, 'q_up_QHX', shape, sh.HEADS_DHC, std=self.std)
    return matmul('bsq,qhx->bshx', x_BSD, up_QHX, sh.HEADS_DHC, policy=self.policy)

  @staticmethod
  def empty_cache(cfg: MLAConfig, batch: int, length: int, dtype: Any) -> Cache:
    """kv_rank + d_rope numbers a token, for all heads together."""
    return {
      'latent_BTR': jnp.zeros((batch, length, cfg.kv_rank), dtype, out_sharding=sh.STREAM),
      'rope_BTC': jnp.zeros((batch, length, cfg.d_rope), dtype, out_sharding=sh.STREAM),
    }
