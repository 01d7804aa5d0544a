"""Attention of new tokens over a cache of MLA latents, in the absorbed form; compressed.py: V4's.

  o_BSHV = decode_attention(q_BSHV, q_rope_BSHC, latent_BTV, rope_BTC, start_B, scale=scale)

Query s of row b sees the first start_b + s + 1 places of the row's cache, or with an index the
places that it names. Backends: 'mosaic' (Hopper, bfloat16) and 'reference', the definition.
"""

# B rows  S new tokens  H heads  V latent (value) width  C rope width  T places  K slots of a query
# N queries (B*S)  P parts of a query's keys

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops import backends
from moe_jax.ops.attention import latent_attention
from moe_jax.ops.decode_attention.compressed import compressed_decode_attention
from moe_jax.ops.decode_attention.parts import consecutive, join, listed, num_parts
from moe_jax.ops.sparse_mla import mosaic
from moe_jax.ops.sparse_mla import sparse_mla as attend
from moe_jax.ops.sparse_mla.mosaic_forward import Keys

__all__ = ['compressed_decode_attention', 'decode_attention', 'sparse_decode_attention']


def decode_attention(
  q_BSHV: Float[Array, 'B S H V'],
  q_rope_BSHC: Float[Array, 'B S H C'],
  latent_BTV: Float[Array, 'B T V'],
  rope_BTC: Float[Array, 'B T C'],
  start_B: Int[Array, 'B'],
  *,
  scale: float,
  implementation: str | None = None,
) -> Float[Array, 'B S H V']:
  """Weighted latents; float32 softmax, q's dtype out. No gradient with 'mosaic'.

  Few queries over a long cache are cut into parts, whose results are joined by their logsumexp.

  Args:
    start_B: int32 tokens in the cache before the new ones, which are in it already. What lies
      behind them must be finite.
    implementation: 'mosaic' or 'reference', which then runs or raises NotImplementedError with the
      reason. None takes the fastest that can.

  Source: arXiv:2405.04434, section 2.1 (the absorbed form).
  """
  (B, S, H, V), T = q_BSHV.shape, latent_BTV.shape[1]
  end_BS = jnp.minimum(start_B[:, None] + jnp.arange(S) + 1, T)
  if _choose(implementation, q_BSHV, q_rope_BSHC, T) == 'reference':
    visible_BST = jnp.arange(T) < end_BS[..., None]
    return latent_attention(q_BSHV, q_rope_BSHC, latent_BTV, rope_BTC, visible_BST, scale=scale)
  parts = num_parts(B * S, H, T)
  first_N = jnp.repeat(jnp.arange(B, dtype=jnp.int32) * T, S)
  keys = consecutive(first_N, end_BS.reshape(-1), parts)
  flat = lambda a: a.reshape(-1, *a.shape[2:])
  named = Keys(flat(latent_BTV), flat(rope_BTC), *keys)
  o, lse = mosaic.forward(flat(q_BSHV), flat(q_rope_BSHC), named, scale=scale, splits=parts)
  return join(o, lse, parts).reshape(B, S, H, V)


def sparse_decode_attention(
  q_BSHV: Float[Array, 'B S H V'],
  q_rope_BSHC: Float[Array, 'B S H C'],
  latent_BTV: Float[Array, 'B T V'],
  rope_BTC: Float[Array, 'B T C'],
  index_BSK: Int[Array, 'B S K'],
  count_BS: Int[Array, 'B S'],
  *,
  scale: float,
  implementation: str | None = None,
) -> Float[Array, 'B S H V']:
  """As decode_attention over the places index[b, s, :count[b, s]] of row b's cache."""
  (B, S, H, V), T, K = q_BSHV.shape, latent_BTV.shape[1], index_BSK.shape[2]
  chosen = _choose(implementation, q_BSHV, q_rope_BSHC, T)
  flat = lambda a: a.reshape(-1, *a.shape[2:])
  index_NK = flat(index_BSK + (jnp.arange(B, dtype=jnp.int32) * T)[:, None, None])
  q, q_rope, latent, rope = map(flat, (q_BSHV, q_rope_BSHC, latent_BTV, rope_BTC))
  count_N = count_BS.reshape(-1)
  if chosen == 'reference':
    o_NHV, _ = attend(q, q_rope, latent, rope, index_NK, count_N, scale=scale, implementation='xla')
    return o_NHV.reshape(B, S, H, V)
  parts = num_parts(B * S, H, K)
  index_NL, count_NP = listed(index_NK, count_N, parts)
  index_XL = index_NL.reshape(B * S * parts, -1)
  keys = Keys(latent, rope, index_XL, count_NP.reshape(-1).astype(jnp.int32))
  o, lse = mosaic.forward(q, q_rope, keys, scale=scale, splits=parts)
  return join(o, lse, parts).reshape(B, S, H, V)


def _choose(implementation: str | None, q_BSHV, q_rope_BSHC, num_places: int) -> str:
  (H, V), C = q_BSHV.shape[-2:], q_rope_BSHC.shape[-1]
  problem = mosaic.unsupported(q_BSHV.dtype, H, V, C)
  if problem is None and num_places % 8:
    problem = f'needs a cache of a multiple of 8 places, got {num_places}'
  return backends.choose('decode_attention', implementation, problem, fallback='reference')
