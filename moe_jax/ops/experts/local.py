"""The experts of one device for the tokens that are there, and their gradient written out.

  x_RD   = x_TD[token_R]                 gather
  h_R2F  = x_RD @ gate_up                kept, named 'expert_hidden'
  a_RF   = swiglu(h_R2F)
  y_RD   = a_RF @ down
  out_TD = sum_k weight_TK * y[row_TK]   the weight enters here, where it costs nothing

Kept for the backward pass are x_TD, h_R2F, the weights and the plan: 2 T D + 4 T K F bytes in
bfloat16 and some integers. It needs neither y nor the gradient of y:

  dout_RD   = dout_TD[token_R]           gather
  da_RF     = dout_RD @ down.T           of y without its weight
  dweight_R = sum_F a * da               one kernel, with
  dh_R2F    = swiglu'(h) * weight * da
  ddown     = (weight * a).T @ dout_RD   the weight enters in that kernel too
  dx_RD     = dh @ gate_up.T
  dgate_up  = x_TD[token_R].T @ dh       gathered once more
  dx_TD     = sum_k dx[row_TK]
"""

# T tokens  D model  F width  E experts  K experts a token  R rows

import functools
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops.grouped_matmul import grouped_matmul, input_grad, weight_grad
from moe_jax.ops.permute import Plan, sort_by_destination, spread_rows, sum_rows
from moe_jax.ops.swiglu import swiglu_backward, swiglu_forward
from moe_jax.ops.varying import match_vma


def local_experts(
  x_TD: jax.Array,
  expert_TK: jax.Array,
  weight_TK: jax.Array,
  gate_up_ED2F: jax.Array,
  down_EFD: jax.Array,
  *,
  rows: int,
  limit: float,
) -> jax.Array:
  """Weighted sum over each token's experts; choice E means an expert elsewhere.

  Args:
    rows: bound on the number of choices that are of an expert here.
    limit: of SwiGLU; 0 for none.
  """
  E, D, _, F = gate_up_ED2F.shape
  plan = sort_by_destination(expert_TK, num_destinations=E, num_rows=rows)
  plan = checkpoint_name(plan, 'expert_plan')
  x_TD, weight_TK, gate_up_EDH, down_EFD, *plan = match_vma(
    x_TD, weight_TK, gate_up_ED2F.reshape(E, D, 2 * F), down_EFD, *plan
  )
  return _experts(limit, x_TD, weight_TK, gate_up_EDH, down_EFD, Plan(*plan))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(limit: float, x_TD, weight_TK, gate_up_EDH, down_EFD, plan: Plan) -> jax.Array:
  return _forward(limit, x_TD, weight_TK, gate_up_EDH, down_EFD, plan)[0]


def _forward(limit: float, x_TD, weight_TK, gate_up_EDH, down_EFD, plan: Plan):
  groups: Any = dict(sizes_E=plan.size_E, offsets_E=plan.offset_E)
  x_RD = spread_rows(x_TD, plan)
  h_R2F = checkpoint_name(grouped_matmul(x_RD, gate_up_EDH, **groups), 'expert_hidden')
  y_RD = grouped_matmul(swiglu_forward(h_R2F, limit=limit), down_EFD, **groups)
  out_TD = sum_rows(y_RD, plan.row_TK, weight_TK)
  return out_TD, (x_TD, weight_TK, gate_up_EDH, down_EFD, plan, h_R2F)


def _backward(limit: float, kept, dout_TD):
  x_TD, weight_TK, gate_up_EDH, down_EFD, plan, h_R2F = kept
  groups: Any = dict(sizes_E=plan.size_E, offsets_E=plan.offset_E)
  dout_RD = spread_rows(dout_TD, plan)
  da_RF = input_grad(dout_RD, down_EFD, **groups)
  dh_R2F, a_RF, dweight_R = swiglu_backward(da_RF, h_R2F, plan.by_row(weight_TK), limit=limit)
  ddown_EFD = weight_grad(a_RF, dout_RD, dtype=down_EFD.dtype, **groups)
  dx_TD = sum_rows(input_grad(dh_R2F, gate_up_EDH, **groups), plan.row_TK)
  x_RD = spread_rows(x_TD, plan)
  dgate_up_EDH = weight_grad(x_RD, dh_R2F, dtype=gate_up_EDH.dtype, **groups)
  dweight_TK = plan.by_choice(dweight_R).astype(weight_TK.dtype)
  no_gradient = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), plan)
  return dx_TD, dweight_TK, dgate_up_EDH, ddown_EFD, no_gradient


_experts.defvjp(_forward, _backward)
