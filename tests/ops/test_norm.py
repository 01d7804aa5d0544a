"""Root-mean-square normalisation against its formula."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.norm import rms_norm

EPS = 1e-6


def make(shape=(3, 5, 16), seed=0):
  x_key, w_key = jax.random.split(jax.random.key(seed))
  return 4 * jax.random.normal(x_key, shape), jax.random.normal(w_key, shape[-1:])


def formula(x, w):
  x = np.asarray(x, np.float64)
  return np.asarray(w, np.float64) * x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def test_rms_norm_equals_its_formula():
  x, w = make()
  y = rms_norm(x, w, eps=EPS)
  # float32: a few roundings of values near 1
  np.testing.assert_allclose(y, formula(x, w), rtol=2e-6)


def test_rms_norm_gradient_equals_the_quotient_rule():
  x, w = make()
  dy = jax.random.normal(jax.random.key(1), x.shape)
  dx, dw = jax.vjp(lambda x, w: rms_norm(x, w, eps=EPS), x, w)[1](dy)
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
  expected = r * (dy * w - x * r**2 * (dy * w * x).mean(-1, keepdims=True))
  np.testing.assert_allclose(dx, expected, atol=2e-6)
  np.testing.assert_allclose(dw, (dy * x * r).sum((0, 1)), atol=1e-5)


def test_rms_norm_of_bfloat16_is_computed_in_float32_and_rounded_once():
  x, w = make()
  x = x.astype(jnp.bfloat16)
  y = rms_norm(x, w, eps=EPS)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, rms_norm(x.astype(jnp.float32), w, eps=EPS).astype(jnp.bfloat16))


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient():
  zeros, w = jnp.zeros((2, 8)), jnp.ones(8)
  y, vjp = jax.vjp(lambda x: rms_norm(x, w, eps=EPS), zeros)
  np.testing.assert_array_equal(y, 0)
  assert np.isfinite(vjp(jnp.ones_like(y))[0]).all()
