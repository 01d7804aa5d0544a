"""MLA's projections: what every attention kind on key-value latents shares."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.config import MLAConfig, RopeConfig
from moe_jax.models.attention.base import Cache, Where, rope_frequencies
from moe_jax.models.layers import Matrix, RMSNorm, matmul, matrix
from moe_jax.ops.decode_attention import decode_attention
from moe_jax.ops.rope import rotate_adjacent, yarn_softmax_factor
from moe_jax.precision import Policy

# B batch  S new tokens  D model  H heads  N nope width  C rope width  V value width
# R key-value latent width  Q query latent width

# the published code keeps this in the latent norms whatever rms_norm_eps is
_LATENT_EPS = 1e-6


class Projected(NamedTuple):
  """The new tokens' queries and latents, rotated and normed, and the up-projections."""

  q_BSHN: jax.Array
  q_rope_BSHC: jax.Array
  latent_BSR: jax.Array
  rope_BSC: jax.Array  # the rotated key channels that all heads share
  q_latent_BSQ: jax.Array  # what the queries were made of; the stream itself where q_rank is 0
  key_RHN: Matrix
  value_RHV: Matrix
  out_HVD: Matrix

  @property
  def entries(self) -> Cache:
    """What the cache keeps of each token: kv_rank + d_rope numbers, for all heads together."""
    return {'latent_BTR': self.latent_BSR, 'rope_BTC': self.rope_BSC}


class LatentAttention(nn.Module):
  """Base of the kinds that read MLA's latents: parameters, projections, cache.

  Source: arXiv:2405.04434, section 2.1.
  """

  cfg: Any  # MLAConfig, or a config that adds to it
  rope: RopeConfig
  std: float
  eps: float
  policy: Policy

  @property
  def scale(self) -> float:
    """What scores are multiplied by before the softmax."""
    width = self.cfg.d_nope + self.cfg.d_rope
    return width**-0.5 * yarn_softmax_factor(self.rope.yarn_factor, self.rope.yarn_mscale_all_dim)

  def project(self, x_BSD: jax.Array, where: Where) -> Projected:
    """Declares MLA's parameters and applies those that need no other token."""
    c, D, R = self.cfg, x_BSD.shape[-1], self.cfg.kv_rank
    H, N, C, V = c.num_heads, c.d_nope, c.d_rope, c.d_value
    kv_DX = matrix(self, 'kv_down_DX', (D, R + C), sh.MATRIX_DX, std=self.std)
    key_RHN = matrix(self, 'key_up_RHN', (R, H, N), sh.HEADS_DHC, std=self.std)
    value_RHV = matrix(self, 'value_up_RHV', (R, H, V), sh.HEADS_DHC, std=self.std)
    out_HVD = matrix(self, 'out_HVD', (H, V, D), sh.HEADS_HCD, std=self.std)
    freq, magnitude = rope_frequencies(C, self.rope), self.rope.yarn_magnitude

    q_BSHX, q_latent_BSQ = self._queries(x_BSD)
    q_BSHN, q_BSHC = jnp.split(q_BSHX, [N], axis=-1)
    q_BSHC = rotate_adjacent(q_BSHC, where.position_BS, freq) * magnitude
    kv_BSX = matmul('bsd,dx->bsx', x_BSD, kv_DX, sh.MATRIX_DX, policy=self.policy)
    latent_BSR = RMSNorm(_LATENT_EPS, name='kv_norm')(kv_BSX[..., :R])
    rope_BSC = rotate_adjacent(kv_BSX[..., None, R:], where.position_BS, freq)[:, :, 0] * magnitude
    return Projected(
      q_BSHN, q_BSHC, latent_BSR, rope_BSC, q_latent_BSQ, key_RHN, value_RHV, out_HVD
    )

  def _queries(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    c, D = self.cfg, x_BSD.shape[-1]
    if c.q_rank:
      down_DQ = matrix(self, 'q_down_DQ', (D, c.q_rank), sh.MATRIX_DX, std=self.std)
      x_BSD = matmul('bsd,dq->bsq', x_BSD, down_DQ, sh.MATRIX_DX, policy=self.policy)
      x_BSD = RMSNorm(_LATENT_EPS, name='q_norm')(x_BSD)
    shape = (x_BSD.shape[-1], c.num_heads, c.d_nope + c.d_rope)
    up_QHX = matrix(self, 'q_up_QHX', shape, sh.HEADS_DHC, std=self.std)
    return matmul('bsq,qhx->bshx', x_BSD, up_QHX, sh.HEADS_DHC, policy=self.policy), x_BSD

  def _up(self, equation: str, a: jax.Array, w: Matrix) -> jax.Array:
    return matmul(equation, a, w, sh.HEADS_DHC, policy=self.policy)

  def expand(self, p: Projected) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys [B, S, H, N+C] and values [B, S, H, V] of multi-head attention."""
    k_BSHN = self._up('bsr,rhn->bshn', p.latent_BSR, p.key_RHN)
    v_BSHV = self._up('bsr,rhv->bshv', p.latent_BSR, p.value_RHV)
    shared_BSHC = jnp.broadcast_to(
      p.rope_BSC[:, :, None], p.q_rope_BSHC.shape, out_sharding=jax.typeof(p.q_rope_BSHC).sharding
    )
    q_BSHX = jnp.concatenate([p.q_BSHN, p.q_rope_BSHC], -1)
    return q_BSHX, jnp.concatenate([k_BSHN, shared_BSHC], -1), v_BSHV

  def absorb(self, p: Projected) -> jax.Array:
    """Queries [B, S, H, R] that meet the latents themselves: the key up-projection taken in."""
    return self._up('bshn,rhn->bshr', p.q_BSHN, p.key_RHN)

  def values(self, o_BSHR: jax.Array, p: Projected) -> jax.Array:
    """Weighted latents -> weighted values [B, S, H, V]."""
    return self._up('bshr,rhv->bshv', o_BSHR, p.value_RHV)

  def output(self, o_BSHV: jax.Array, p: Projected) -> jax.Array:
    return matmul(
      'bshv,hvd->bsd', o_BSHV, p.out_HVD, sh.HEADS_HCD, policy=self.policy, out=sh.STREAM
    )

  @staticmethod
  def empty_cache(cfg: MLAConfig, batch: int, length: int, dtype: Any) -> Cache:
    """kv_rank + d_rope numbers a token, for all heads together."""
    return {
      'latent_BTR': jnp.zeros((batch, length, cfg.kv_rank), dtype, out_sharding=sh.STREAM),
      'rope_BTC': jnp.zeros((batch, length, cfg.d_rope), dtype, out_sharding=sh.STREAM),
    }


def cached_attention(
  q_BSHR: jax.Array,
  q_rope_BSHC: jax.Array,
  latent_BTR: jax.Array,
  rope_BTC: jax.Array,
  start_B: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """Weighted latents of new tokens over all of a cache's up to themselves, on each device."""

  def on_device(q, q_rope, latent, rope, start):
    return decode_attention(q, q_rope, latent, rope, start, scale=scale)

  specs = sh.HEADS, sh.HEADS, sh.STREAM, sh.STREAM, sh.BY_ROW
  operands = q_BSHR, q_rope_BSHC, latent_BTR, rope_BTC, start_B
  return jax.shard_map(on_device, in_specs=specs, out_specs=sh.HEADS, check_vma=False)(
    *map(jax.sharding.reshard, operands, specs)
  )
