"""The definition of the mixing of residual streams.

Source: arXiv:2606.19348, section 2.1 (equation 8 is `sinkhorn`, of the transpose).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.ops.norm import unit_rms

# B batch  S sequence  D model  J streams read  K streams written (as many)  X mixing numbers


class Mixing(NamedTuple):
  """How one site reads and writes the streams, float32, for every token."""

  pre_BSJ: Float[Array, 'B S J']  # share of each stream in the layer's input
  post_BSJ: Float[Array, 'B S J']  # share of the layer's output that each stream gets
  comb_BSJK: Float[Array, 'B S J K']  # what stream K keeps of stream J


def sinkhorn(
  logits_JK: Float[Array, '... J K'], *, iterations: int, eps: float
) -> Float[Array, '... J K']:
  """Makes a positive matrix of equal sums: softmax over K, then columns and rows in turn.

  The last step normalises columns, so columns sum to one, and rows only nearly: about 4e-2 off
  after 20 iterations at moderate logits.
  """
  m_JK = jax.nn.softmax(logits_JK, axis=-1) + eps

  def columns(m_JK: Array) -> Array:
    return m_JK / (m_JK.sum(-2, keepdims=True) + eps)

  def both(_: int, m_JK: Array) -> Array:
    return columns(m_JK / (m_JK.sum(-1, keepdims=True) + eps))

  return jax.lax.fori_loop(0, iterations - 1, both, columns(m_JK))


def gates(
  x_BSJD: Float[Array, 'B S J D'], fn_JDX: Float[Array, 'J D X'], *, norm_eps: float
) -> Float[Array, 'B S X']:
  """The streams of a token as one vector of unit mean square, times `fn`; float32."""
  B, S, J, D = x_BSJD.shape
  flat_BSE = unit_rms(x_BSJD.astype(jnp.float32).reshape(B, S, J * D), eps=norm_eps)
  fn_EX = fn_JDX.astype(jnp.float32).reshape(J * D, -1)
  return jnp.einsum('bse,ex->bsx', flat_BSE, fn_EX, precision='highest')


def mixing(
  x_BSJD: Float[Array, 'B S J D'],
  fn_JDX: Float[Array, 'J D X'],
  base_X: Float[Array, 'X'],
  scale_3: Float[Array, '3'],
  *,
  iterations: int,
  eps: float,
  norm_eps: float,
) -> Mixing:
  """What the streams themselves say about how to mix them.

  Args:
    fn_JDX: the X = J + J + J * J numbers are pre, post, and comb row by row.
    scale_3: one factor for each of the three.
  """
  J = x_BSJD.shape[2]
  y_BSX = gates(x_BSJD, fn_JDX, norm_eps=norm_eps)
  pre_BSJ, post_BSJ, comb_BSX = jnp.split(y_BSX, [J, 2 * J], axis=-1)
  pre_J, post_J, comb_X = jnp.split(base_X, [J, 2 * J])
  comb_BSX = comb_BSX * scale_3[2] + comb_X
  return Mixing(
    jax.nn.sigmoid(pre_BSJ * scale_3[0] + pre_J) + eps,
    2 * jax.nn.sigmoid(post_BSJ * scale_3[1] + post_J),
    sinkhorn(comb_BSX.reshape(*comb_BSX.shape[:2], J, J), iterations=iterations, eps=eps),
  )


def read(x_BSJD: Float[Array, 'B S J D'], pre_BSJ: Float[Array, 'B S J']) -> Float[Array, 'B S D']:
  """sum_j pre_j x_j; float32 inside, x's dtype out."""
  y_BSD = jnp.einsum('bsj,bsjd->bsd', pre_BSJ, x_BSJD.astype(jnp.float32), precision='highest')
  return y_BSD.astype(x_BSJD.dtype)


def write(
  x_BSJD: Float[Array, 'B S J D'], y_BSD: Float[Array, 'B S D'], mix: Mixing
) -> Float[Array, 'B S J D']:
  """x'_k = post_k y + sum_j comb_jk x_j; float32 inside, x's dtype out."""
  kept_BSKD = jnp.einsum(
    'bsjk,bsjd->bskd', mix.comb_BSJK, x_BSJD.astype(jnp.float32), precision='highest'
  )
  added_BSKD = mix.post_BSJ[..., None] * y_BSD.astype(jnp.float32)[:, :, None]
  return (kept_BSKD + added_BSKD).astype(x_BSJD.dtype)
