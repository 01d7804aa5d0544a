"""Choosing the next token from its logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(
  logits_BV: Float[Array, 'B V'], key: jax.Array, *, temperature: float, top_p: float
) -> Int[Array, 'B']:
  """Draws from softmax(logits / temperature) cut to its nucleus; temperature 0 takes the largest.

  The nucleus is the smallest set of most likely tokens whose probability reaches `top_p`.
  Source: arXiv:1904.09751.
  """
  if temperature == 0:
    return jnp.argmax(logits_BV, axis=-1)
  logits_BV = logits_BV.astype(jnp.float32) / temperature
  if top_p < 1:
    sorted_BV = jax.lax.sort(jax.nn.softmax(logits_BV), dimension=1)[:, ::-1]
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, 1), axis=-1, keepdims=True)
    logits_BV = jnp.where(jax.nn.softmax(logits_BV) >= least_B1, logits_BV, -jnp.inf)
  return jax.random.categorical(key, logits_BV)
