"""A linear map whose forward, dgrad and wgrad products are each computed by a recipe.

  y_TN = linear(x_TK, w_KN, recipe)

  forward   y  = x w        operands quantised along K
  dgrad     dx = dy w^T     along N
  wgrad     dw = x^T dy     along T

Where a product is FP8 its operands are quantised just before, with scales from themselves; what the
backward pass keeps of x is then the FP8 values that wgrad will read, one byte each. fp8.py says how
a product of quantised operands is computed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops.linear import fp8
from moe_jax.ops.linear.fp8 import Weights, quantize_weights
from moe_jax.ops.recipe import Product, Recipe

__all__ = ['IMPLEMENTATIONS', 'Weights', 'linear', 'quantize_weights']

# T tokens of one device  K in  N out

IMPLEMENTATIONS = fp8.IMPLEMENTATIONS


def linear(
  x_TK: jax.Array,
  w_KN: jax.Array,
  recipe: Recipe,
  *,
  ready: Weights | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """x w in x's dtype; on one device, within shard_map where there are more.

  Args:
    w_KN: any float dtype; its gradient has the same, rounded once from float32 sums.
    ready: w of `quantize_weights`; without it w is quantised here, anew in each pass.
    implementation: of FP8 products, `simulated` (quantised, then multiplied in float32) or
      `native`; by default native where the device can.

  Raises:
    NotImplementedError: `native` products that cannot run here; it says why.
  """
  ready = ready or Weights(None, None)
  return _linear(recipe, fp8.choose(recipe, implementation), x_TK, w_KN, ready)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(
  recipe: Recipe, implementation: str, x_TK: jax.Array, w_KN: jax.Array, ready: Weights
) -> jax.Array:
  x8, _ = fp8.operands(x_TK, recipe.forward, None)
  return _product(recipe.forward, implementation, x_TK, x8, w_KN, ready.forward)


def _forward(recipe: Recipe, implementation: str, x_TK: jax.Array, w_KN: jax.Array, ready: Weights):
  x8, x8_KT = fp8.operands(x_TK, recipe.forward, recipe.wgrad)
  y_TN = _product(recipe.forward, implementation, x_TK, x8, w_KN, ready.forward)
  # named here: what a remat policy keeps by this name is FP8 where wgrad reads FP8
  kept = checkpoint_name(x_TK if x8_KT is None else x8_KT, 'linear_input')
  return y_TN, (kept, w_KN, ready.dgrad)


def _backward(recipe: Recipe, implementation: str, kept: Any, dy_TN: jax.Array):
  x, w_KN, w8_KN = kept
  dy8, dy8_NT = fp8.operands(dy_TN, recipe.dgrad, recipe.wgrad, side=1)
  dx_TK = _product(recipe.dgrad, implementation, dy_TN, dy8, w_KN, w8_KN, transpose_w=True)
  if dy8_NT is not None:
    dw_KN = fp8.weight_grad(
      x, dy8_NT, recipe.wgrad, implementation, shape=w_KN.shape, dtype=w_KN.dtype
    )
  else:
    dw_KN = jnp.einsum(
      'tk,tn->kn',
      x.astype(recipe.wgrad.first),
      dy_TN.astype(recipe.wgrad.second),
      preferred_element_type=jnp.float32,
    ).astype(w_KN.dtype)
  return dx_TK, dw_KN, None


_linear.defvjp(_forward, _backward)


def _product(
  product: Product,
  implementation: str,
  x_TK: jax.Array,
  x8: Any,
  w: jax.Array,
  w8: Any,
  *,
  transpose_w: bool = False,
) -> jax.Array:
  """x w for w [K, N], x w^T for w [N, K], in x's dtype; of the quantised x and w where they are."""
  if x8 is not None:
    return fp8.matmul(
      x8, w, product, implementation,
      w8=w8, transpose_w=transpose_w, num_rows=x_TK.shape[0], dtype=x_TK.dtype,
    )  # fmt: skip
  return jnp.einsum(
    'tk,nk->tn' if transpose_w else 'tk,kn->tn',
    x_TK.astype(product.first),
    w.astype(product.second),
    preferred_element_type=jnp.float32,
  ).astype(x_TK.dtype)
