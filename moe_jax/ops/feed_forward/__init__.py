"""A dense feed-forward whose products are all in FP8, as one op: down(swiglu(gate x, up x)).

  x8, x8_DT     = rows and columns of x       one reading
  h_T2F         = x8 @ [gate, up]             one product
  a8, h8        = rows of swiglu(h), of h     one reading
  y_TD          = a8 @ down

  dy8, dy8_DT   = rows and columns of dy
  da_TF         = dy8 @ down.T
  dh8, dh8_FT, a8_FT                          one reading of da and h8
  ddown         = a8_FT @ dy8_DT.T
  dx_TD         = dh8 @ [gate, up].T
  [dgate, dup]  = x8_DT @ dh8_FT.T

Kept for the backward pass are x8_DT and h8, a byte each: T D + 2 T F. swiglu is made again of h8,
which arXiv:2412.19437, 3.3.3, does too.
"""

# T tokens of one device  D model  F width

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops import quantize as qz
from moe_jax.ops import swiglu
from moe_jax.ops.linear import Weights, fp8, linear
from moe_jax.ops.recipe import Recipe


class Three(NamedTuple):
  """Something of each matrix: gate and up [D, F], down [F, D]."""

  gate: Any
  up: Any
  down: Any


NONE_READY = Three(*(Weights(None, None),) * 3)


def feed_forward(
  x_TD: jax.Array,
  weights: Three,
  recipe: Recipe,
  *,
  limit: float = 0.0,
  ready: Three = NONE_READY,
  implementation: str | None = None,
) -> jax.Array:
  """In x's dtype; on one device, within shard_map where there are more.

  Products that are not all FP8 with block scales, or sides that are no multiples of 128, go one by
  one through `ops.linear`.

  Args:
    limit: of SwiGLU; 0 for none.
    ready: each matrix of `ops.linear.quantize_weights`; without it, it is quantised here, anew in
      each pass.
    implementation: of FP8 products, as in `linear`.
  """
  sides = *x_TD.shape, weights.gate.shape[1]
  block = all(p.is_fp8 and p.scaling == 'block' for p in recipe)
  if not block or any(side % qz.TILE for side in sides):
    product = functools.partial(linear, recipe=recipe, implementation=implementation)
    gate_TF = product(x_TD, weights.gate, ready=ready.gate)
    up_TF = product(x_TD, weights.up, ready=ready.up)
    gate_TF, up_TF = checkpoint_name((gate_TF, up_TF), 'dense_hidden')
    return product(swiglu.swiglu(gate_TF, up_TF, limit=limit), weights.down, ready=ready.down)
  how = recipe, limit, fp8.choose(recipe, implementation)
  return _feed_forward(how, x_TD, weights, ready)


type _How = tuple[Recipe, float, str]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _feed_forward(how: _How, x_TD: jax.Array, weights: Three, ready: Three) -> jax.Array:
  return _forward(how, x_TD, weights, ready)[0]


def _forward(how: _How, x_TD: jax.Array, weights: Three, ready: Three):
  recipe, limit, _ = how
  fmt, weight_fmt = recipe.forward.formats()

  def times(x: qz.Quantized, w8: qz.Quantized) -> jax.Array:
    return _product(x, w8, how, recipe.forward, x_TD.dtype)

  turned = lambda w, q: q.forward or qz.quantize_blocks_transposed(w, weight_fmt)
  gate8, up8, down8 = (turned(*pair) for pair in zip(weights, ready, strict=True))
  x8, x8_DT = fp8.operands(x_TD, recipe.forward, recipe.wgrad)
  assert x8 is not None
  h_T2F = times(x8, _joined(gate8, up8, 0))
  a8, h8 = swiglu.swiglu_rows_and_hidden(h_T2F, fmt, limit=limit)
  kept = checkpoint_name(x8_DT, 'linear_input'), checkpoint_name(h8, 'dense_hidden')
  return times(a8, down8), (*kept, weights, Three(*(q.dgrad for q in ready)))


def _backward(how: _How, saved: Any, dy_TD: jax.Array):
  recipe, limit, by = how
  x8_DT, h8, weights, ready = saved
  fmt, weight_fmt = recipe.dgrad.formats()
  a_fmt, dh_fmt = recipe.wgrad.formats()

  def times(x: qz.Quantized, w8: qz.Quantized) -> jax.Array:
    return _product(x, w8, how, recipe.dgrad, dy_TD.dtype)

  plain = lambda w, q: q or qz.quantize_blocks(w, weight_fmt)
  gate8, up8, down8 = (plain(*pair) for pair in zip(weights, ready, strict=True))
  dy8, dy8_DT = fp8.operands(dy_TD, recipe.dgrad, recipe.wgrad, side=1)
  assert dy8 is not None and dy8_DT is not None
  da_TF = times(dy8, down8)
  ones_T = jnp.ones_like(da_TF[:, 0], jnp.float32)
  dh8, dh8_FT, a8_FT, _ = swiglu.swiglu_backward_quantized(
    da_TF, h8, ones_T, (fmt, dh_fmt, a_fmt), limit=limit
  )
  gradient = functools.partial(fp8.weight_grad, product=recipe.wgrad, implementation=by)
  (D, F), dtype = weights.gate.shape, weights.gate.dtype
  ddown_FD = gradient(a8_FT, dy8_DT, shape=(F, D), dtype=weights.down.dtype)
  dx_TD = times(dh8, _joined(gate8, up8, 1))
  both_D2F = gradient(x8_DT, dh8_FT, shape=(D, 2 * F), dtype=dtype)
  return dx_TD, Three(both_D2F[:, :F], both_D2F[:, F:], ddown_FD), None


_feed_forward.defvjp(_forward, _backward)


def _joined(gate: qz.Quantized, up: qz.Quantized, dim: int) -> qz.Quantized:
  both = (jnp.concatenate(pair, axis=dim) for pair in zip(gate, up, strict=True))
  return qz.Quantized(*both)


def _product(
  x: qz.Quantized, w8: qz.Quantized, how: _How, product: Any, dtype: jnp.dtype
) -> jax.Array:
  """x w8.T, [T, N], of rows x [T, K] and blocks w8 [N, K]."""
  shape: Any = jax.ShapeDtypeStruct(w8.values.shape, dtype)
  return fp8.matmul(
    x, shape, product, how[2], w8=w8, transpose_w=True, num_rows=x.values.shape[0], dtype=dtype
  )
