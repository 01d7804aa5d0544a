"""Multi-head latent attention."""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import MLAConfig
from moe_jax.models.attention.base import Cache, Where, append
from moe_jax.models.attention.latent import LatentAttention, cached_attention
from moe_jax.ops.attention import attention

# B batch  S new tokens  T cached tokens  D model  H heads  C rope width  V value width
# R key-value latent width  X key width


class MLA(LatentAttention):
  """Multi-head latent attention; expanded for training, on the latents when there is a cache.

  Source: arXiv:2405.04434, section 2.1.
  """

  cfg: MLAConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array, where: Where, cache: Cache | None):
    p = self.project(x_BSD, where)
    if cache is None:
      q_BSHX, k_BSHX, v_BSHV = self.expand(p)
      q_BSHX = checkpoint_name(q_BSHX, 'attention_qkv')
      k_BSHX, v_BSHV = checkpoint_name((k_BSHX, v_BSHV), 'attention_latent_kv')
      segment_BS = where.segment_BS
      o_BSHV = attention(
        q_BSHX, k_BSHX, v_BSHV, segment_BS, segment_BS, where.start_B, scale=self.scale
      )
    else:
      cache = append(cache, p.entries, where.start_B)
      latent_BTR, rope_BTC = (cache[n].astype(x_BSD.dtype) for n in ('latent_BTR', 'rope_BTC'))
      o_BSHR = cached_attention(
        self.absorb(p), p.q_rope_BSHC, latent_BTR, rope_BTC, where.start_B, scale=self.scale
      )
      o_BSHV = self.values(o_BSHR, p)
    return self.output(o_BSHV, p), cache, {}
