"""Orthogonalisation by a fixed number of matrix products, as DeepSeek-V4 does it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# N matrices  X rows  Y columns

# (a, b, c) of each round: the first eight reach for 1 from far below, the last two settle there
ROUNDS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


def orthogonalize(x_NXY: Float[Array, 'N X Y'], *, dtype: str = 'float32') -> Float[Array, 'N X Y']:
  """The nearest (semi-)orthogonal matrix to each of N, by the hybrid Newton-Schulz iteration.

  X = M / |M|_F, then ten rounds of X <- a X + b (X X^T) X + c (X X^T)^2 X. Each round moves the
  singular values s <- a s + b s^3 + c s^5 and leaves the singular vectors alone: values from 3e-4
  of the norm upward arrive within [1, 1.00054], those from 3e-5 within [1, 1.0021]. Zero stays 0.

  Args:
    dtype: what matrix products multiply in ('float32' or 'bfloat16'); sums are float32.

  Source: arXiv:2606.19348, section 2.4; the first rounds are Muon's (K. Jordan 2024).
  """
  # the products X X^T are square in the smaller side
  wide = x_NXY.shape[-2] <= x_NXY.shape[-1]
  x_NXY = x_NXY.astype(jnp.float32) if wide else x_NXY.astype(jnp.float32).mT
  norm_N11 = jnp.linalg.norm(x_NXY, axis=(-2, -1), keepdims=True)
  x_NXY /= jnp.maximum(norm_N11, jnp.finfo(jnp.float32).tiny)

  def product(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = 'highest' if dtype == 'float32' else 'default'
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)

  def one_round(x_NXY: jax.Array, abc_3: jax.Array):
    a, b, c = abc_3
    gram_NXX = product(x_NXY, x_NXY.mT)
    return a * x_NXY + product(b * gram_NXX + c * product(gram_NXX, gram_NXX), x_NXY), None

  x_NXY, _ = jax.lax.scan(one_round, x_NXY, jnp.asarray(ROUNDS, jnp.float32))
  return x_NXY if wide else x_NXY.mT
