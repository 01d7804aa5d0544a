"""Sparse MLA: every query attends to the latents it names, all heads to the same.

  o_THV, lse_TH = sparse_mla(q_THV, q_rope_THC, latent_SV, rope_SC, index_TK, count_T, scale=scale)

MLA in its absorbed form: the queries are already multiplied by the key up-projection, and a latent
is key and value of all heads. Backends: 'mosaic' (Hopper, bfloat16) and 'xla' (everything).
reference.py is the definition.
"""

# T queries  H heads  V latent (value) width  C rope width  S keys  K slots of a query

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops import backends
from moe_jax.ops.grouped_matmul.layout import match_vma
from moe_jax.ops.sparse_mla import mosaic, xla
from moe_jax.ops.sparse_mla.mosaic_forward import Keys

__all__ = ['key_mass', 'sparse_mla', 'unsupported']

# slots that the kernels take at a time
_BLOCK = 64


def unsupported(
  q_THV: jax.Array | jax.ShapeDtypeStruct, q_rope_THC: jax.Array | jax.ShapeDtypeStruct
) -> str | None:
  """Why 'mosaic' cannot take these operands here, in one line, or None if it can."""
  num_heads, value_width = q_THV.shape[-2:]
  return mosaic.unsupported(q_THV.dtype, num_heads, value_width, q_rope_THC.shape[-1])


def sparse_mla(
  q_THV: Float[Array, 'T H V'],
  q_rope_THC: Float[Array, 'T H C'],
  latent_SV: Float[Array, 'S V'],
  rope_SC: Float[Array, 'S C'],
  index_TK: Int[Array, 'T K'],
  count_T: Int[Array, 'T'],
  *,
  scale: float,
  implementation: str | None = None,
) -> tuple[Float[Array, 'T H V'], Float[Array, 'T H']]:
  """Attention of query t over the latents index[t, :count[t]]; output and logsumexp.

  Differentiable in q, q_rope, latent and rope. Float32 softmax and sums; the output has q's dtype,
  the logsumexp is float32. 'mosaic' gives the same bits on every run: it has no atomics.

  Args:
    index_TK: int32, each latent at most once a query; those from count on are not used. In
      ascending order queries in flight meet the same latents at about the same time, in L2.
    count_T: int32, at most K. A query of none gets zeros, and a logsumexp of -1e30.
    implementation: 'mosaic' or 'xla', which then runs or raises NotImplementedError with the
      reason. None takes the fastest that can.

  Source: arXiv:2512.02556, section 2.1.
  """
  operands = q_THV, q_rope_THC, latent_SV, rope_SC
  if len({a.dtype for a in operands}) > 1:
    raise ValueError(f'dtypes {[str(a.dtype) for a in operands]} must be one.')
  if _choose(implementation, q_THV, q_rope_THC) == 'xla':
    return xla.sparse_mla(*operands, index_TK, count_T, scale=scale)
  index_TK = _whole_blocks(index_TK, count_T)
  return _mosaic(scale, *match_vma(*operands, index_TK, count_T))


def key_mass(
  q_THV: Float[Array, 'T H V'],
  q_rope_THC: Float[Array, 'T H C'],
  latent_SV: Float[Array, 'S V'],
  rope_SC: Float[Array, 'S C'],
  index_TK: Int[Array, 'T K'],
  count_T: Int[Array, 'T'],
  lse_TH: Float[Array, 'T H'],
  *,
  scale: float,
  implementation: str | None = None,
) -> Float[Array, 'T K']:
  """The probability that sparse_mla gives each named latent, summed over heads. No gradient."""
  args = q_THV, q_rope_THC, latent_SV, rope_SC, index_TK, count_T, lse_TH
  q_THV, q_rope_THC, latent_SV, rope_SC, *_, lse_TH = jax.lax.stop_gradient(args)
  K = index_TK.shape[1]
  if _choose(implementation, q_THV, q_rope_THC) == 'xla':
    return xla.key_mass(
      q_THV, q_rope_THC, latent_SV, rope_SC, index_TK, count_T, lse_TH, scale=scale
    )
  keys = Keys(latent_SV, rope_SC, _whole_blocks(index_TK, count_T), count_T)
  mass_TK = mosaic.key_mass(q_THV, q_rope_THC, keys, lse_TH, scale=scale)[:, :K]
  return jnp.where(jnp.arange(K) < count_T[:, None], mass_TK, 0)


def _whole_blocks(index_TK: jax.Array, count_T: jax.Array) -> jax.Array:
  """The kernels gather whole blocks of slots: what is not used must at least be a row."""
  K = index_TK.shape[1]
  index_TK = jnp.where(jnp.arange(K) < count_T[:, None], index_TK, 0)
  return jnp.pad(index_TK, ((0, 0), (0, -K % _BLOCK)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mosaic(scale, q_THV, q_rope_THC, *keys) -> Any:
  o_THV, lse_TH = mosaic.forward(q_THV, q_rope_THC, Keys(*keys), scale=scale)
  return match_vma(o_THV, lse_TH, q_THV)[:2]


def _forward(scale, *args):
  out: Any = _mosaic(scale, *args)
  return out, (*args, *out)


def _backward(scale, kept, cotangents):
  q_THV, q_rope_THC, *keys, o_THV, lse_TH = kept
  do_THV, dlse_TH = cotangents
  # d lse / d s = p, and ds = p (dp - delta): the logsumexp's gradient joins delta
  delta_TH = (o_THV.astype(jnp.float32) * do_THV.astype(jnp.float32)).sum(-1) - dlse_TH
  grads = mosaic.backward(q_THV, q_rope_THC, Keys(*keys), lse_TH, delta_TH, do_THV, scale=scale)
  cast = [a.astype(q_THV.dtype) for a in tuple(grads)]
  return (*match_vma(*cast, q_THV)[:4], None, None)


_mosaic.defvjp(_forward, _backward)


def _choose(implementation: str | None, q_THV: jax.Array, q_rope_THC: jax.Array) -> str:
  return backends.choose('sparse_mla', implementation, unsupported(q_THV, q_rope_THC))
