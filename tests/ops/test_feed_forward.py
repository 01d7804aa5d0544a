"""The feed-forward in FP8 against the same written out on dequantised operands, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import quantize as qz
from moe_jax.ops.feed_forward import Three, feed_forward
from moe_jax.ops.linear import linear, quantize_weights
from moe_jax.ops.recipe import Product, Recipe
from moe_jax.ops.swiglu import swiglu

# T tokens  D model  F width
T, D, F = 256, 128, 256
E4M3 = Product('e4m3', 'e4m3', 'block')
FP8 = Recipe(E4M3, E4M3, E4M3)
# no quotient of FP8 values, at which autodiff of a minimum would halve the gradient
LIMIT = 1.3


def operands(tokens=T, width=F):
  keys = jax.random.split(jax.random.key(0), 5)
  draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
  weights = Three(draw(keys[0], D, width), draw(keys[1], D, width), draw(keys[2], width, D))
  return (
    draw(keys[3], tokens, D),
    jax.tree.map(lambda w: w * 0.1, weights),
    draw(keys[4], tokens, D),
  )


def with_gradients(fn, x_TD, weights, dy_TD):
  def there_and_back(x_TD, weights, dy_TD):
    y_TD, pull = jax.vjp(fn, x_TD, weights)
    return y_TD, *pull(dy_TD)

  return jax.jit(there_and_back)(x_TD, weights, dy_TD)


def written_out(x_TD, weights, dy_TD):
  """Rows and columns are rounded with scales along what a product contracts, matrices by blocks."""
  row = lambda a: qz.dequantize_rows(qz.quantize_rows(a))
  column = lambda a: qz.dequantize_rows(qz.quantize_columns(a))
  gate, up, down = (qz.dequantize_blocks(qz.quantize_blocks(w)) for w in weights)
  both_D2F = jnp.concatenate([gate, up], axis=1)
  bfloat16 = lambda a: a.astype(jnp.bfloat16)
  act = lambda h: swiglu(h[:, :F], h[:, F:], limit=LIMIT)

  h_T2F = bfloat16(row(x_TD) @ both_D2F).astype(jnp.float32)
  y_TD = row(act(h_T2F)) @ down
  a_TF, pull = jax.vjp(act, row(h_T2F))
  (dh_T2F,) = pull(bfloat16(row(dy_TD) @ down.T).astype(jnp.float32))
  dh_T2F, a_TF = bfloat16(dh_T2F), bfloat16(a_TF)
  dboth_D2F = column(x_TD) @ column(dh_T2F).T
  ddown_FD = column(a_TF) @ column(dy_TD).T
  return y_TD, row(dh_T2F) @ both_D2F.T, Three(dboth_D2F[:, :F], dboth_D2F[:, F:], ddown_FD)


def distance(found, exact):
  found, exact = (np.asarray(a, np.float64) for a in (found, exact))
  return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def test_values_and_gradients_are_those_written_out():
  x_TD, weights, dy_TD = operands()
  call = lambda x, w: feed_forward(x, w, FP8, limit=LIMIT)
  found = with_gradients(call, x_TD, weights, dy_TD)
  exact = jax.jit(written_out)(x_TD, weights, dy_TD)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
    # rounded once to bfloat16; sums in another order turn a few roundings to 8 bits
    assert a.dtype == jnp.bfloat16 and distance(a, b) < 4e-3


def test_matrices_that_are_ready_change_nothing():
  x_TD, weights, dy_TD = operands()
  ready = Three(*(quantize_weights(w, FP8) for w in weights))
  runs = (
    with_gradients(lambda x, w, r=r: feed_forward(x, w, FP8, **r), x_TD, weights, dy_TD)
    for r in ({}, {'ready': ready})
  )
  for a, b in zip(*(jax.tree.leaves(run) for run in runs), strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize(
  ('recipe', 'tokens', 'width'),
  [(FP8, 100, F), (FP8, T, 192), (FP8._replace(wgrad=Product('bfloat16', 'bfloat16')), T, F)],
  ids=['odd_tokens', 'odd_width', 'wgrad_in_bfloat16'],
)
def test_anything_else_goes_product_by_product(recipe, tokens, width):
  x_TD, weights, dy_TD = operands(tokens, width)

  def one_by_one(x, w):
    a = swiglu(linear(x, w.gate, recipe), linear(x, w.up, recipe))
    return linear(a, w.down, recipe)

  found = with_gradients(lambda x, w: feed_forward(x, w, recipe), x_TD, weights, dy_TD)
  expected = with_gradients(one_by_one, x_TD, weights, dy_TD)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
