"""Root-mean-square and layer normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
  x: Float[Array, '... D'], weight_D: Float[Array, 'D'], *, eps: float
) -> Float[Array, '... D']:
  """`weight * x / sqrt(mean(x^2) + eps)` in float32, out in x's dtype. Source: arXiv:1910.07467."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  return (y * weight_D.astype(jnp.float32)).astype(x.dtype)


def unit_rms(x: Float[Array, '... D'], *, eps: float) -> Float[Array, '... D']:
  """`x / sqrt(mean(x^2) + eps)` in float32, out in x's dtype: a norm without weights."""
  y = x.astype(jnp.float32)
  return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def layer_norm(
  x: Float[Array, '... D'], weight_D: Float[Array, 'D'], bias_D: Float[Array, 'D'], *, eps: float
) -> Float[Array, '... D']:
  """`weight * (x - mean) / sqrt(variance + eps) + bias` in float32, out in x's dtype.

  Source: arXiv:1607.06450.
  """
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  return (y * weight_D.astype(jnp.float32) + bias_D.astype(jnp.float32)).astype(x.dtype)
