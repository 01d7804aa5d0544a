"""Mixture of block attention."""

from typing import Any

import flax.linen as nn
import jax

from moe_jax.config import MoBAConfig
from moe_jax.models.attention.base import Cache, Where, append
from moe_jax.models.attention.grouped import GroupedAttention, empty_heads, span
from moe_jax.ops import moba
from moe_jax.ops.backends import log_fallback

# B batch  S new tokens  D model  G key-value heads  M query heads of each  C key width  V value


class MoBA(GroupedAttention):
  """Each query head attends to its own block and to the top_k earlier ones it agrees with most.

  No parameters beyond grouped-query attention's, so that a layer may turn to dense attention and
  back. Documents are cut into blocks separately; see ops.blocks. Source: arXiv:2502.13189, 2.2.
  """

  cfg: MoBAConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array, where: Where, cache: Cache | None):
    c = self.cfg
    q_BSGMC = self.queries(x_BSD, where)
    k_BTGC = self.rotate(self.keys('k_DGC', x_BSD, c.d_head), where.position_BS)
    v_BTGV = self.keys('v_DGV', x_BSD, c.d_value)
    if cache is None:
      problem = moba.unsupported(q_BSGMC, c.d_value, c.block_size)
      if problem is None:
        o_BSGMV = moba.rows_attention(
          q_BSGMC,
          k_BTGC,
          v_BTGV,
          where.position_BS,
          where.segment_BS,
          block=c.block_size,
          top_k=c.top_k,
          scale=self.scale,
        )
        return self.output(o_BSGMV, x_BSD.shape[-1]), None, {}
      log_fallback('moba', 'kernels', 'masks over all pairs', problem)
    else:
      cache = append(cache, {'k_BTGC': k_BTGC, 'v_BTGV': v_BTGV}, where.start_B)
      k_BTGC, v_BTGV = (cache[n].astype(x_BSD.dtype) for n in ('k_BTGC', 'v_BTGV'))
    o_BSGMV = moba.attention(
      q_BSGMC,
      k_BTGC,
      v_BTGV,
      span(where, cache),
      block=c.block_size,
      top_k=c.top_k,
      scale=self.scale,
    )
    return self.output(o_BSGMV, x_BSD.shape[-1]), cache, {}

  @staticmethod
  def empty_cache(cfg: MoBAConfig, batch: int, length: int, dtype: Any) -> Cache:
    widths = {'k_BTGC': cfg.d_head, 'v_BTGV': cfg.d_value}
    return empty_heads(widths, cfg.num_kv_heads, batch, length, dtype)
