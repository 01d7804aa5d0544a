"""The products of the experts, as they come or in FP8, and how their operands are made.

An operand is an array, or a `Quantized`: rows where a product contracts along the row, columns for
the gradients in matrices, which contract over rows (ops/quantize, grouped_matmul/fp8.py).
"""

# T tokens  D model  F width  E experts  R rows  H = 2F

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops import quantize as qz
from moe_jax.ops import swiglu
from moe_jax.ops.grouped_matmul import grouped_matmul, input_grad, mosaic_gpu, weight_grad
from moe_jax.ops.grouped_matmul.fp8 import grouped_matmul_fp8, weight_grad_fp8
from moe_jax.ops.permute import Plan, spread_rows
from moe_jax.ops.recipe import Recipe


class Tokens(NamedTuple):
  """The rows x[token_R], for kernels that fetch them by index: no spread copy is made."""

  x_TD: jax.Array
  token_R: jax.Array


type Operand = jax.Array | qz.Quantized | Tokens


def rows_multiple(recipe: Recipe | None) -> int:
  return qz.TILE if recipe and recipe.is_fp8 else 1


def check(recipe: Recipe | None, d: int, f: int) -> None:
  if recipe and recipe.is_fp8 and (d % qz.TILE or f % qz.TILE):
    raise ValueError(
      f'experts in FP8 need widths that are multiples of {qz.TILE}, one block of scales, got '
      f'{d} x {f}. Change d_model or d_expert, or let experts be bfloat16.'
    )
  if recipe and any(p.is_fp8 and p.scaling != 'block' for p in recipe):
    raise NotImplementedError(
      f"experts in FP8 have scaling='block' alone, got {[p.scaling for p in recipe]}."
    )


def _groups(plan: Plan) -> dict[str, Any]:
  return dict(sizes_E=plan.size_E, offsets_E=plan.offset_E)


def _spread(x_TD: jax.Array, f: int, plan: Plan) -> Operand:
  if mosaic_gpu.gathers(x_TD.dtype, len(plan.choice_R), x_TD.shape[1], f):
    return Tokens(x_TD, plan.token_R)
  return spread_rows(x_TD, plan)


@dataclasses.dataclass(frozen=True)
class Rows:
  """x @ w, and with `transposed` dy @ w.T, of operands that keep their dtype."""

  transposed: bool

  def spread(self, x_TD: jax.Array, f: int, plan: Plan) -> Operand:
    return _spread(x_TD, f, plan)

  def swiglu(self, h_RH: jax.Array, limit: float) -> tuple[Operand, Operand]:
    """swiglu(h), and h as the backward pass is to have it."""
    return swiglu.swiglu_forward(h_RH, limit=limit), h_RH

  def rows(self, x: Any, w_EDF: jax.Array, w8: Any, plan: Plan) -> jax.Array:
    del w8
    if isinstance(x, Tokens):
      groups = plan.offset_E, plan.size_E
      return mosaic_gpu.forward(
        x.x_TD, w_EDF.astype(x.x_TD.dtype), *groups, transpose_w=self.transposed, token_R=x.token_R
      )
    op = input_grad if self.transposed else grouped_matmul
    return op(x, w_EDF, **_groups(plan))


@dataclasses.dataclass(frozen=True)
class RowsFP8:
  """The same in FP8."""

  transposed: bool
  fmt: qz.Format
  weight_fmt: qz.Format
  dtype: Any  # of the result

  def spread(self, x_TD: jax.Array, f: int, plan: Plan) -> Operand:
    del f
    # quantised before they are spread: a row's scale is that of its token
    q = qz.quantize_rows(x_TD, self.fmt)
    scale_KR = q.scale.at[:, plan.token_R].get(mode='fill', fill_value=0)
    return qz.Quantized(spread_rows(q.values, plan, multiple=qz.TILE), scale_KR)

  def swiglu(self, h_RH: jax.Array, limit: float) -> tuple[Operand, Operand]:
    return swiglu.swiglu_rows_and_hidden(h_RH, self.fmt, limit=limit)

  def rows(self, x: Any, w_EDF: jax.Array, w8: qz.Quantized | None, plan: Plan) -> jax.Array:
    """Of w8, the copy that this product reads, where there is one; else it is made here."""
    # contracted along what is contiguous: [E, F, D] for x @ w, [E, D, F] for dy @ w.T
    blocks = qz.quantize_blocks if self.transposed else qz.quantize_blocks_transposed
    return grouped_matmul_fp8(
      x, w8 or blocks(w_EDF, self.weight_fmt), dtype=self.dtype, **_groups(plan)
    )


@dataclasses.dataclass(frozen=True)
class Weights:
  """x.T @ dy for each expert, of operands that keep their dtype."""

  def spread_first(self, x_TD: jax.Array, f: int, plan: Plan) -> Operand:
    return _spread(x_TD, f, plan)

  spread_second = spread_first

  def weights(self, x: Any, dy: Any, plan: Plan, dtype: jnp.dtype) -> jax.Array:
    if isinstance(x, Tokens) or isinstance(dy, Tokens):
      gathers, token_R = ('x', x.token_R) if isinstance(x, Tokens) else ('dy', dy.token_R)
      x, dy = (a.x_TD if isinstance(a, Tokens) else a for a in (x, dy))
      groups = plan.offset_E, plan.size_E
      return mosaic_gpu.weight_grad(x, dy, *groups, dtype=dtype, token_R=token_R, gathers=gathers)
    return weight_grad(x, dy, dtype=dtype, **_groups(plan))


@dataclasses.dataclass(frozen=True)
class WeightsFP8:
  """The same in FP8. Gaps between groups are zero in what is spread."""

  first_fmt: qz.Format
  second_fmt: qz.Format

  def spread_first(self, x_TD: jax.Array, f: int, plan: Plan) -> Operand:
    del f
    return qz.quantize_columns(x_TD, self.first_fmt, token_R=plan.token_R)

  def spread_second(self, dy_TD: jax.Array, f: int, plan: Plan) -> Operand:
    del f
    return qz.quantize_columns(dy_TD, self.second_fmt, token_R=plan.token_R)

  def weights(self, x: Any, dy: Any, plan: Plan, dtype: jnp.dtype) -> jax.Array:
    return weight_grad_fp8(x, dy, dtype=dtype, **_groups(plan))


def forward(recipe: Recipe | None, dtype: jnp.dtype) -> Rows | RowsFP8:
  if recipe is None or not recipe.forward.is_fp8:
    return Rows(transposed=False)
  return RowsFP8(False, *recipe.forward.formats(), dtype)


def dgrad(recipe: Recipe | None, dtype: jnp.dtype) -> Rows | RowsFP8:
  if recipe is None or not recipe.dgrad.is_fp8:
    return Rows(transposed=True)
  return RowsFP8(True, *recipe.dgrad.formats(), dtype)


def wgrad(recipe: Recipe | None) -> Weights | WeightsFP8:
  if recipe is None or not recipe.wgrad.is_fp8:
    return Weights()
  return WeightsFP8(*recipe.wgrad.formats())


def spread_gradient(
  recipe: Recipe | None, dout_TD: jax.Array, f: int, plan: Plan
) -> tuple[Operand, Operand]:
  """The rows of dout for dgrad and for wgrad."""
  first, second = dgrad(recipe, dout_TD.dtype), wgrad(recipe)
  match first, second:
    case RowsFP8(fmt=fmt), WeightsFP8(second_fmt=column_fmt) if fmt == column_fmt:
      return qz.quantize_rows_and_columns(dout_TD, fmt, token_R=plan.token_R)
  return first.spread(dout_TD, f, plan), second.spread_second(dout_TD, f, plan)


def swiglu_backward(
  recipe: Recipe | None, da_RF: jax.Array, h_RH: Any, weight_R: jax.Array, limit: float
) -> tuple[Operand, Operand, Operand, jax.Array]:
  """dh for dgrad and for wgrad, weight * a for wgrad, and the gradient in the weight."""
  if recipe and recipe.dgrad.is_fp8 and recipe.wgrad.is_fp8:
    a_fmt, dh_fmt = recipe.wgrad.formats()
    fmts = recipe.dgrad.formats()[0], dh_fmt, a_fmt
    return swiglu.swiglu_backward_quantized(da_RF, h_RH, weight_R, fmts, limit=limit)
  dh, a, dweight_R = swiglu.swiglu_backward(da_RF, h_RH, weight_R, limit=limit)
  if recipe and recipe.dgrad.is_fp8:
    return qz.quantize_rows(dh, recipe.dgrad.formats()[0]), dh, a, dweight_R
  if recipe and recipe.wgrad.is_fp8:
    a_fmt, dh_fmt = recipe.wgrad.formats()
    return dh, qz.quantize_columns(dh, dh_fmt), qz.quantize_columns(a, a_fmt), dweight_R
  return dh, dh, a, dweight_R
