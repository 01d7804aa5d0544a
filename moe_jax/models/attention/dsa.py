"""DeepSeek sparse attention: MLA over the keys that a lightning indexer picks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.config import DSAConfig, RopeConfig
from moe_jax.models.attention.base import (
  Cache,
  Where,
  append,
  cached_segments,
  rope_frequencies,
)
from moe_jax.models.attention.latent import LatentAttention
from moe_jax.models.layers import LayerNorm, matmul, weight
from moe_jax.ops.attention import latent_attention, masked_attention, visible
from moe_jax.ops.indexer import attention_target, index_loss, index_scores, top_k_mask
from moe_jax.ops.rope import rotate_half_split
from moe_jax.precision import Policy

# B batch  S new tokens  T cached tokens  D model  Q query latent width  R key-value latent width
# J index heads  I index width  H heads  X key width  V value width

_EPS = 1e-6  # of the index keys' norm, in published code whatever the other norms have


class Indexer(nn.Module):
  """Queries, keys and head weights of the index scores.

  Half-split rotary embeddings turn the first d_rope channels; the main attention turns adjacent
  pairs. (The first released demo had adjacent pairs here too, corrected on 2025-11-17.)
  Source: arXiv:2512.02556, section 2.1.
  """

  cfg: DSAConfig
  rope: RopeConfig
  std: float
  policy: Policy

  @nn.compact
  def __call__(self, x_BSD: jax.Array, q_latent_BSQ: jax.Array, where: Where):
    """Returns q [B, S, J, I], k [B, S, I] and float32 head weights [B, S, J]."""
    c, D, Q = self.cfg, x_BSD.shape[-1], q_latent_BSQ.shape[-1]
    J, I = c.num_index_heads, c.d_index
    query_QJI = weight(self, 'query_QJI', (Q, J, I), sh.HEADS_DHC, std=self.std)
    key_DI = weight(self, 'key_DI', (D, I), sh.MATRIX_DX, std=self.std)
    head_DJ = weight(self, 'head_DJ', (D, J), sh.MATRIX_DF, std=self.std)
    freq, magnitude = rope_frequencies(c.d_rope, self.rope), self.rope.yarn_magnitude

    def rotate(a_BSXI: jax.Array) -> jax.Array:
      rope, rest = jnp.split(a_BSXI, [c.d_rope], axis=-1)
      rope = rotate_half_split(rope, where.position_BS, freq) * magnitude
      return jnp.concatenate([rope, rest], -1)

    q_BSJI = matmul('bsq,qji->bsji', q_latent_BSQ, query_QJI, sh.HEADS_DHC, policy=self.policy)
    k_BSI = matmul('bsd,di->bsi', x_BSD, key_DI, sh.MATRIX_DX, policy=self.policy)
    k_BSI = LayerNorm(_EPS, name='k_norm')(k_BSI)
    # float32 under every policy, as the gate: rounding here changes which keys are seen
    head_DJ = jax.sharding.reshard(head_DJ, sh.gathered(sh.MATRIX_DF))
    w_BSJ = jnp.einsum('bsd,dj->bsj', x_BSD.astype(jnp.float32), head_DJ, precision='highest')
    return rotate(q_BSJI), rotate(k_BSI[:, :, None])[:, :, 0], w_BSJ * J**-0.5


class DSA(LatentAttention):
  """MLA over the index_top_k keys that the indexer scores highest.

  The indexer reads the stream and the query latent detached and learns only from `indexer_loss`;
  its choice passes no gradient, so all else learns only from the other losses.
  Source: arXiv:2512.02556, section 2.1.
  """

  cfg: DSAConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array, where: Where, cache: Cache | None):
    c, aux = self.cfg, {}
    p = self.project(x_BSD, where)
    indexer = Indexer(c, self.rope, self.std, self.policy, name='indexer')
    q_BSJI, k_BTI, w_BSJ = indexer(*jax.lax.stop_gradient((x_BSD, p.q_latent_BSQ)), where)
    if cache is not None:
      cache = append(cache, {**p.entries, 'index_BTI': k_BTI}, where.start_B)
      k_BTI = cache['index_BTI'].astype(x_BSD.dtype)
      ones_BS = jnp.ones_like(where.segment_BS)
      mask_BST = visible(ones_BS, cached_segments(k_BTI), where.start_B)
    else:
      mask_BST = visible(where.segment_BS, where.segment_BS, where.start_B)
    score_BST = index_scores(q_BSJI, k_BTI, w_BSJ)
    if c.stage == 'sparse':
      mask_BST = top_k_mask(score_BST, mask_BST, k=c.index_top_k)

    if cache is not None:
      latent_BTR, rope_BTC = (cache[n].astype(x_BSD.dtype) for n in ('latent_BTR', 'rope_BTC'))
      o_BSHR = latent_attention(
        self.absorb(p), p.q_rope_BSHC, latent_BTR, rope_BTC, mask_BST, scale=self.scale
      )
      return self.output(self.values(o_BSHR, p), p), cache, aux
    q_BSHX, k_BSHX, v_BSHV = self.expand(p)
    o_BSHV = masked_attention(q_BSHX, k_BSHX, v_BSHV, mask_BST, scale=self.scale)
    if c.index_loss_weight:
      target_BST = attention_target(q_BSHX, k_BSHX, mask_BST, scale=self.scale)
      loss = index_loss(target_BST, score_BST, mask_BST, where.segment_BS > 0)
      aux['indexer_loss'] = c.index_loss_weight * loss
    return self.output(o_BSHV, p), cache, aux

  @staticmethod
  def empty_cache(cfg: Any, batch: int, length: int, dtype: Any) -> Cache:
    """MLA's latents and one index key: kv_rank + d_rope + d_index numbers a token."""
    index_BTI = jnp.zeros((batch, length, cfg.d_index), dtype, out_sharding=sh.STREAM)
    return {**LatentAttention.empty_cache(cfg, batch, length, dtype), 'index_BTI': index_BTI}
