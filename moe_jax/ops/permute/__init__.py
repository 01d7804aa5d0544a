"""Tokens to rows in destination order, and back.

Both directions read by index and never scatter-add, forward and backward, so results are the same
from run to run. A destination is an expert, or a device on the way to one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# T tokens  D width  K choices a token  R rows  E destinations


class Plan(NamedTuple):
  """Where every choice of every token goes. R is static; some rows may stay unused."""

  token_R: Int[Array, 'R']  # the token that fills each row; any for unused rows
  row_TK: Int[Array, 'T K']  # the row of each choice; R for a choice that goes nowhere
  size_E: Int[Array, 'E']  # rows of each destination


def sort_by_destination(
  destination_TK: Int[Array, 'T K'], *, num_destinations: int, num_rows: int
) -> Plan:
  """Lays choices out by destination, tokens in order within each.

  Args:
    destination_TK: destination of each choice; `num_destinations` for a choice that goes nowhere.
    num_rows: R; at least as many as there are choices that go somewhere, at most T * K.
  """
  T, K = destination_TK.shape
  flat = destination_TK.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  row = jnp.zeros_like(flat).at[order].set(jnp.arange(T * K, dtype=flat.dtype), unique_indices=True)
  row_TK = jnp.where(destination_TK < num_destinations, row.reshape(T, K), num_rows)
  size_E = (destination_TK[..., None] == jnp.arange(num_destinations)).sum((0, 1), dtype=jnp.int32)
  used_R = jnp.arange(num_rows) < size_E.sum()
  return Plan(jnp.where(used_R, order[:num_rows] // K, 0), row_TK, size_E)


def bucket_by_destination(visits_TE: Bool[Array, 'T E']) -> Plan:
  """Lays tokens out in one bucket of T rows for each destination, filled from the front."""
  T, E = visits_TE.shape
  place_TE = jnp.cumsum(visits_TE, axis=0) - 1
  row_TE = jnp.where(visits_TE, jnp.arange(E) * T + place_TE, E * T)
  token_R = jnp.argsort(~visits_TE, axis=0, stable=True).T.reshape(-1)
  return Plan(token_R, row_TE, visits_TE.sum(0, dtype=jnp.int32))


def _gather_rows(y_RD: Array, row_TK: Array) -> Array:
  """y_RD[row_TK], zero for row R: [T, K, D]."""
  R = y_RD.shape[0]
  y_TKD = y_RD.at[jnp.minimum(row_TK, R - 1)].get(mode='promise_in_bounds')
  return jnp.where((row_TK < R)[..., None], y_TKD, 0)


def _no_gradient(tree):
  return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), tree)


@jax.custom_vjp
def dispatch(x_TD: Float[Array, 'T D'], plan: Plan) -> Float[Array, 'R D']:
  """Copies each token into the rows of its choices; unused rows repeat some token."""
  return x_TD.at[plan.token_R].get(mode='promise_in_bounds')


def _dispatch_fwd(x_TD, plan):
  return dispatch(x_TD, plan), plan


def _dispatch_bwd(plan, dy_RD):
  dx_TD = _gather_rows(dy_RD, plan.row_TK).astype(jnp.float32).sum(1).astype(dy_RD.dtype)
  return dx_TD, _no_gradient(plan)


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(
  y_RD: Float[Array, 'R D'], weight_TK: Float[Array, 'T K'], plan: Plan
) -> Float[Array, 'T D']:
  """Sums each token's rows by weight, in float32, returned in y's dtype."""
  y_TKD = _gather_rows(y_RD, plan.row_TK).astype(jnp.float32)
  return jnp.einsum('tkd,tk->td', y_TKD, weight_TK.astype(jnp.float32)).astype(y_RD.dtype)


def _combine_fwd(y_RD, weight_TK, plan):
  return combine(y_RD, weight_TK, plan), (y_RD, weight_TK, plan)


def _combine_bwd(saved, dout_TD):
  y_RD, weight_TK, plan = saved
  T, K = weight_TK.shape
  R = y_RD.shape[0]
  # the weight of the choice behind each row; unused rows get zero
  weight_R = jnp.zeros(R + 1, jnp.float32)
  weight_R = weight_R.at[plan.row_TK.reshape(T * K)].set(weight_TK.reshape(T * K))[:R]
  dout_RD = dout_TD.at[plan.token_R].get(mode='promise_in_bounds').astype(jnp.float32)
  dy_RD = (dout_RD * weight_R[:, None]).astype(y_RD.dtype)
  y_TKD = _gather_rows(y_RD, plan.row_TK).astype(jnp.float32)
  dweight_TK = jnp.einsum('tkd,td->tk', y_TKD, dout_TD.astype(jnp.float32))
  return dy_RD, dweight_TK.astype(weight_TK.dtype), _no_gradient(plan)


combine.defvjp(_combine_fwd, _combine_bwd)
