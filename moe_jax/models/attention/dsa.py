"""DeepSeek sparse attention: MLA over the keys that a lightning indexer picks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.config import DSAConfig, RopeConfig
from moe_jax.models.attention import gathered
from moe_jax.models.attention.base import (
  Cache,
  Where,
  append,
  cached_segments,
  rope_frequencies,
)
from moe_jax.models.attention.latent import LatentAttention, Projected, cached_attention
from moe_jax.models.layers import LayerNorm, matmul, weight
from moe_jax.ops.attention import attention, latent_attention, masked_attention, visible
from moe_jax.ops.indexer import attention_target, index_loss, index_scores, top_k_mask
from moe_jax.ops.rope import rotate_half_split
from moe_jax.precision import Policy

# B batch  S new tokens  T cached tokens  D model  Q query latent width  R key-value latent width
# J index heads  I index width  H heads  X key width  V value width

# tokens from which the warm-up's scores of all pairs are made in chunks
_LONG = 2048
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
    c = self.cfg
    p = self.project(x_BSD, where)
    indexer = Indexer(c, self.rope, self.std, self.policy, name='indexer')
    q_BSJI, k_BTI, w_BSJ = indexer(*jax.lax.stop_gradient((x_BSD, p.q_latent_BSQ)), where)
    if cache is None:
      o_BSHV, aux = self._train(p, (q_BSJI, k_BTI, w_BSJ), where)
      return self.output(o_BSHV, p), None, aux
    cache = append(cache, {**p.entries, 'index_BTI': k_BTI}, where.start_B)
    latent_BTR, rope_BTC, k_BTI = (
      cache[n].astype(x_BSD.dtype) for n in ('latent_BTR', 'rope_BTC', 'index_BTI')
    )
    latents = gathered.Latents(self.absorb(p), p.q_rope_BSHC, latent_BTR, rope_BTC)
    if c.stage != 'sparse':
      o_BSHR = cached_attention(*latents, where.start_B, scale=self.scale)
    elif k_BTI.shape[1] > c.index_top_k and gathered.serves(*latents[:2]):
      place_BS = jnp.broadcast_to(jnp.arange(x_BSD.shape[1]), where.segment_BS.shape)
      end_BS = where.start_B[:, None] + place_BS.astype(jnp.int32) + 1
      index = gathered.Index(q_BSJI, k_BTI, w_BSJ, jnp.zeros_like(end_BS), end_BS)
      o_BSHR = gathered.attend_cache(latents, index, k=c.index_top_k, scale=self.scale)
    else:
      ones_BS = jnp.ones_like(where.segment_BS)
      mask_BST = visible(ones_BS, cached_segments(k_BTI), where.start_B)
      mask_BST = top_k_mask(index_scores(q_BSJI, k_BTI, w_BSJ), mask_BST, k=c.index_top_k)
      o_BSHR = latent_attention(*latents, mask_BST, scale=self.scale)
    return self.output(self.values(o_BSHR, p), p), cache, {}

  def _train(
    self, p: Projected, indexer: tuple[jax.Array, jax.Array, jax.Array], where: Where
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Values [B, S, H, V] and the indexer's loss."""
    c, segment_BS = self.cfg, where.segment_BS
    valid_BS = segment_BS > 0
    if c.stage == 'sparse' and segment_BS.shape[1] > c.index_top_k:
      latents = gathered.Latents(self.absorb(p), p.q_rope_BSHC, p.latent_BSR, p.rope_BSC)
      if gathered.serves(*latents[:2]):
        index = gathered.Index(*indexer, *gathered.ranges(segment_BS))
        importance = valid_BS / jnp.maximum(valid_BS.sum(), 1) if c.index_loss_weight else None
        o_BSHR, loss_B = gathered.attend(
          latents, index, importance, k=c.index_top_k, scale=self.scale
        )
        return self.values(o_BSHR, p), self._aux(loss_B.sum())
    q_BSHX, k_BSHX, v_BSHV = self.expand(p)
    if c.stage == 'dense_warmup' and segment_BS.shape[1] > _LONG:
      o_BSHV = attention(
        q_BSHX, k_BSHX, v_BSHV, segment_BS, segment_BS, where.start_B, scale=self.scale
      )
      importance_BS = valid_BS / jnp.maximum(valid_BS.sum(), 1)
      loss_B = gathered.warmup_loss(
        indexer, q_BSHX, k_BSHX, segment_BS, importance_BS, scale=self.scale
      )
      return o_BSHV, self._aux(loss_B.sum())
    mask_BST = visible(segment_BS, segment_BS, where.start_B)
    score_BST = index_scores(*indexer)
    if c.stage == 'sparse':
      mask_BST = top_k_mask(score_BST, mask_BST, k=c.index_top_k)
    o_BSHV = masked_attention(q_BSHX, k_BSHX, v_BSHV, mask_BST, scale=self.scale)
    if not c.index_loss_weight:
      return o_BSHV, {}
    target_BST = attention_target(q_BSHX, k_BSHX, mask_BST, scale=self.scale)
    return o_BSHV, self._aux(index_loss(target_BST, score_BST, mask_BST, valid_BS))

  def _aux(self, loss: jax.Array) -> dict[str, jax.Array]:
    weight = self.cfg.index_loss_weight
    return {'indexer_loss': weight * loss} if weight else {}

  @staticmethod
  def empty_cache(cfg: Any, batch: int, length: int, dtype: Any) -> Cache:
    """MLA's latents and one index key: kv_rank + d_rope + d_index numbers a token."""
    index_BTI = jnp.zeros((batch, length, cfg.d_index), dtype, out_sharding=sh.STREAM)
    return {**LatentAttention.empty_cache(cfg, batch, length, dtype), 'index_BTI': index_BTI}
