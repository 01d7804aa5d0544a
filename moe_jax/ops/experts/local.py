"""The experts of one device for the tokens that are there, and their gradient written out.

  x_RD   = x_TD[token_R]                 spread
  h_R2F  = x_RD @ gate_up                kept, named 'expert_hidden'
  a_RF   = swiglu(h_R2F)
  y_RD   = a_RF @ down
  out_TD = sum_k weight_TK * y[row_TK]   the weight enters here, where it costs nothing

Kept for the backward pass are x_TD, h_R2F, the weights and the plan: 2 T D + 4 T K F bytes in
bfloat16 and some integers. Where the forward product is in FP8 so is the h_R2F that is kept, of
2 T K F bytes, and swiglu is made again of that (arXiv:2412.19437, 3.3.3). It needs neither y nor
the gradient of y:

  dout_RD   = dout_TD[token_R]           spread once, for both products that take it
  da_RF     = dout_RD @ down.T           of y without its weight
  dweight_R = sum_F a * da               one kernel, with
  dh_R2F    = swiglu'(h) * weight * da
  ddown     = (weight * a).T @ dout_RD   the weight enters in that kernel too
  dx_RD     = dh @ gate_up.T
  dgate_up  = x_TD[token_R].T @ dh       spread once more
  dx_TD     = sum_k dx[row_TK]

In bfloat16 on Hopper no spread copy is made: the products fetch tokens by index. Each of the three
kinds of products may be in FP8 (products.py), whose operands are quantised where they are made:
tokens before they are spread, their gradients while they are, a and dh by the kernels that compute
them.
"""

# T tokens  D model  F width  E experts  K experts a token  R rows

import functools

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops.experts import products
from moe_jax.ops.linear import Weights
from moe_jax.ops.permute import Plan, padded_rows, sort_by_destination, sum_rows
from moe_jax.ops.recipe import Recipe
from moe_jax.ops.varying import match_vma

type Ready = tuple[Weights, Weights]
NONE_READY = (Weights(None, None), Weights(None, None))


def local_experts(
  x_TD: jax.Array,
  expert_TK: jax.Array,
  weight_TK: jax.Array,
  gate_up_ED2F: jax.Array,
  down_EFD: jax.Array,
  *,
  rows: int,
  limit: float,
  recipe: Recipe | None = None,
  ready: Ready = NONE_READY,
) -> jax.Array:
  """Weighted sum over each token's experts; choice E means an expert elsewhere.

  Args:
    rows: bound on the number of choices that are of an expert here.
    limit: of SwiGLU; 0 for none.
    recipe: what the operands of products are rounded to; None: nothing, they are as they come.
    ready: both matrices of `ops.linear.quantize_weights`, seen as [E, D, 2F] and [E, F, D].
  """
  E, D, _, F = gate_up_ED2F.shape
  products.check(recipe, D, F)
  # with a scale for 128 rows, those must have one owner
  multiple = products.rows_multiple(recipe)
  plan = sort_by_destination(
    expert_TK,
    num_destinations=E,
    num_rows=padded_rows(rows, E, multiple),
    multiple=multiple,
  )
  plan = checkpoint_name(plan, 'expert_plan')
  operands = x_TD, weight_TK, gate_up_ED2F.reshape(E, D, 2 * F), down_EFD, plan, ready
  return _experts((limit, recipe), *match_vma(*operands))


type _Static = tuple[float, Recipe | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(
  static: _Static, x_TD, weight_TK, gate_up_EDH, down_EFD, plan: Plan, ready: Ready
) -> jax.Array:
  return _forward(static, x_TD, weight_TK, gate_up_EDH, down_EFD, plan, ready)[0]


def _forward(static: _Static, x_TD, weight_TK, gate_up_EDH, down_EFD, plan: Plan, ready: Ready):
  (limit, recipe), F = static, down_EFD.shape[1]
  p, (gate_up, down) = products.forward(recipe, x_TD.dtype), ready
  x = p.spread(x_TD, F, plan)
  a_RF, h_R2F = p.swiglu(p.rows(x, gate_up_EDH, gate_up.forward, plan), limit)
  h_R2F = checkpoint_name(h_R2F, 'expert_hidden')
  y_RD = p.rows(a_RF, down_EFD, down.forward, plan)
  out_TD = sum_rows(y_RD, plan.row_TK, weight_TK)
  return out_TD, (x_TD, weight_TK, gate_up_EDH, down_EFD, plan, h_R2F, (gate_up.dgrad, down.dgrad))


def _backward(static: _Static, kept, dout_TD):
  limit, recipe = static
  x_TD, weight_TK, gate_up_EDH, down_EFD, plan, h_R2F, (gate_up8, down8) = kept
  F = down_EFD.shape[1]
  dgrad, wgrad = products.dgrad(recipe, x_TD.dtype), products.wgrad(recipe)
  dout, dout_wgrad = products.spread_gradient(recipe, dout_TD, F, plan)
  da_RF = dgrad.rows(dout, down_EFD, down8, plan)
  dh, dh_wgrad, a_wgrad, dweight_R = products.swiglu_backward(
    recipe, da_RF, h_R2F, plan.by_row(weight_TK), limit
  )
  ddown_EFD = wgrad.weights(a_wgrad, dout_wgrad, plan, down_EFD.dtype)
  dx_TD = sum_rows(dgrad.rows(dh, gate_up_EDH, gate_up8, plan), plan.row_TK)
  dgate_up_EDH = wgrad.weights(wgrad.spread_first(x_TD, F, plan), dh_wgrad, plan, gate_up_EDH.dtype)
  dweight_TK = plan.by_choice(dweight_R).astype(weight_TK.dtype)
  no_gradient = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), plan)
  return dx_TD, dweight_TK, dgate_up_EDH, ddown_EFD, no_gradient, None


_experts.defvjp(_forward, _backward)
