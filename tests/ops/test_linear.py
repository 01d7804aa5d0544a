"""The three products of a linear map against quantising by hand and multiplying in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import quantize as q
from moe_jax.ops.linear import linear
from moe_jax.ops.recipe import Product, Recipe, uniform

# T tokens  K in  N out

BLOCK = Product('e4m3', 'e4m3', 'block')
TENSOR = Product('e4m3', 'e4m3', 'tensor')
BFLOAT16 = Product('bfloat16', 'bfloat16')


def make(T=40, K=256, N=192, dtype=jnp.bfloat16):
  keys = jax.random.split(jax.random.key(0), 3)
  # rows and columns of very different size, as training has them
  x = jax.random.normal(keys[0], (T, K)) * jnp.exp(jax.random.normal(keys[0], (T, 1)) * 2)
  w = jax.random.normal(keys[1], (K, N)) * K**-0.5
  dy = jax.random.normal(keys[2], (T, N)) * 1e-6 * jnp.exp(jax.random.normal(keys[2], (1, N)) * 2)
  return x.astype(dtype), w, dy.astype(dtype)


def padded(a, rows, columns):
  return jnp.pad(a, ((0, -a.shape[0] % rows), (0, -a.shape[1] % columns)))


def rounded(a, product, side, along):
  """What is left of `a` after quantising `along` rows, columns or blocks; float64."""
  fmt = product.formats()[side]
  if product.scaling == 'tensor':
    found = q.quantize_tensor(a, fmt)
    return np.asarray(found.values.astype(jnp.float32), np.float64) * float(found.scale)
  if along == 'rows':
    found = q.dequantize_rows(q.quantize_rows(padded(a, 1, 128), fmt))
  elif along == 'columns':
    found = q.dequantize_rows(q.quantize_columns(padded(a, 128, 1), fmt)).T
  else:
    found = q.dequantize_blocks(q.quantize_blocks(padded(a, 128, 128), fmt))
  return np.asarray(found, np.float64)[: a.shape[0], : a.shape[1]]


@pytest.mark.parametrize(
  'recipe',
  [
    Recipe(BLOCK, BLOCK, BLOCK),
    Recipe(TENSOR, TENSOR, TENSOR),
    Recipe(BLOCK, BLOCK._replace(first='e5m2'), BLOCK._replace(second='e5m2', power_of_two=True)),
  ],
  ids=['block', 'tensor', 'e5m2 gradients and powers of two'],
)
def test_products_are_those_of_the_rounded_operands(recipe):
  x, w, dy = make()
  y, backward = jax.vjp(lambda x, w: linear(x, w, recipe), x, w)
  dx, dw = backward(dy)
  forward, dgrad, wgrad = recipe
  exact = {
    'y': rounded(x, forward, 0, 'rows') @ rounded(w, forward, 1, 'blocks'),
    'dx': rounded(dy, dgrad, 0, 'rows') @ rounded(w, dgrad, 1, 'blocks').T,
    'dw': rounded(x, wgrad, 0, 'columns').T @ rounded(dy, wgrad, 1, 'columns'),
  }
  for name, found in (('y', y), ('dx', dx), ('dw', dw)):
    # y and dx are rounded to bfloat16, by a tensor's scale once more; dw is float32
    tolerance = 2**-7 if name != 'dw' else 1e-5
    scale = np.abs(exact[name]).max()
    np.testing.assert_allclose(
      np.asarray(found.astype(jnp.float32)), exact[name], rtol=tolerance, atol=1e-6 * scale
    )
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_a_bfloat16_wgrad_keeps_the_input_as_it_is():
  x, w, dy = make()
  recipe = Recipe(BLOCK, BLOCK, BFLOAT16)
  dw = jax.vjp(lambda x, w: linear(x, w, recipe), x, w)[1](dy)[1]
  exact = np.asarray(x.astype(jnp.float32), np.float64).T @ np.asarray(dy.astype(jnp.float32))
  np.testing.assert_allclose(dw, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


def test_small_gradients_do_not_underflow():
  x, w, dy = make()
  recipe = Recipe(BLOCK, BLOCK, BLOCK)
  pull = jax.vjp(lambda x, w: linear(x, w, recipe), x, w)[1]
  tiny = pull((dy.astype(jnp.float32) * 2.0**-60).astype(jnp.bfloat16))
  # scales follow the gradient, so a power of two goes straight through
  np.testing.assert_array_equal(tiny[1], pull(dy)[1] * 2.0**-60)


def test_unscaled_recipes_are_plain_products():
  x, w, dy = make(dtype=jnp.float32)
  with jax.default_matmul_precision('highest'):
    y, backward = jax.vjp(lambda x, w: linear(x, w, uniform('float32')), x, w)
    expected, expected_backward = jax.vjp(jnp.matmul, x, w)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(backward(dy), expected_backward(dy), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * np.abs(other).max())


def test_native_products_are_refused_where_there_are_none():
  x, w, _ = make()
  with pytest.raises(NotImplementedError, match='Hopper'):
    linear(x, w, Recipe(BLOCK, BLOCK, BLOCK), implementation='native')
