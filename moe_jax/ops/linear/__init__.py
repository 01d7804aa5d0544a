"""A linear map whose forward, dgrad and wgrad products are each computed by a recipe.

  y_TN = linear(x_TK, w_KN, recipe)

  forward   y  = x w        operands quantised along K
  dgrad     dx = dy w^T     along N
  wgrad     dw = x^T dy     along T

Where a product is FP8 the operands are quantised just before it, with scales from themselves; what
the backward pass keeps of x is then the FP8 values that wgrad will read, one byte each. fp8.py
says how a product of quantised operands is computed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops.linear import fp8
from moe_jax.ops.recipe import Product, Recipe

# T tokens of one device  K in  N out

IMPLEMENTATIONS = fp8.IMPLEMENTATIONS


def linear(
  x_TK: jax.Array, w_KN: jax.Array, recipe: Recipe, *, implementation: str | None = None
) -> jax.Array:
  """x w in x's dtype; on one device, within shard_map where there are more.

  Args:
    w_KN: any float dtype; its gradient has the same, rounded once from float32 sums.
    implementation: of FP8 products, `simulated` (quantised, then multiplied in float32) or
      `native`; by default native where the device can.

  Raises:
    NotImplementedError: `native` products that cannot run here; it says why.
  """
  return _linear(recipe, fp8.choose(recipe, implementation), x_TK, w_KN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(recipe: Recipe, implementation: str, x_TK: jax.Array, w_KN: jax.Array) -> jax.Array:
  return _product(recipe.forward, implementation, x_TK, w_KN).astype(x_TK.dtype)


def _forward(recipe: Recipe, implementation: str, x_TK: jax.Array, w_KN: jax.Array):
  y_TN = _linear(recipe, implementation, x_TK, w_KN)
  # named within the quantised pair: kept as FP8 wherever it is kept
  kept = fp8.columns(x_TK, recipe.wgrad, side=0) if recipe.wgrad.is_fp8 else x_TK
  # an empty array carries x's dtype to the backward pass
  like = jnp.zeros((0,), x_TK.dtype)
  return y_TN, (checkpoint_name(kept, 'linear_input'), w_KN, like)


def _backward(recipe: Recipe, implementation: str, kept: Any, dy_TN: jax.Array):
  x, w_KN, like = kept
  dx_TK = _product(recipe.dgrad, implementation, dy_TN, w_KN, transpose_w=True)
  if recipe.wgrad.is_fp8:
    dy = fp8.columns(dy_TN, recipe.wgrad, side=1)
    dw_KN = fp8.weight_grad(x, dy, recipe.wgrad, implementation)
  else:
    cast = lambda a, dtype: a.astype(dtype)
    dw_KN = jnp.einsum(
      'tk,tn->kn',
      cast(x, recipe.wgrad.first),
      cast(dy_TN, recipe.wgrad.second),
      preferred_element_type=jnp.float32,
    )
  return dx_TK.astype(like.dtype), dw_KN.astype(w_KN.dtype)


_linear.defvjp(_forward, _backward)


def _product(
  product: Product,
  implementation: str,
  x_TK: jax.Array,
  w: jax.Array,
  *,
  transpose_w: bool = False,
) -> jax.Array:
  """x w for w [K, N], or x w^T for w [N, K]."""
  if product.is_fp8:
    return fp8.matmul(x_TK, w, product, implementation, transpose_w=transpose_w)
  return jnp.einsum(
    'tk,nk->tn' if transpose_w else 'tk,kn->tn',
    x_TK.astype(product.first),
    w.astype(product.second),
    preferred_element_type=jnp.float32,
  )
