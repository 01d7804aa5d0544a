"""Tokens to rows in destination order, and back.

Both directions read by index and never scatter-add, forward and backward, so results are the same
from run to run. A destination is an expert, or a device on the way to one.
"""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.ops import pallas_triton
from moe_jax.ops.permute import reference, triton
from moe_jax.ops.permute.plan import Plan
from moe_jax.ops.permute.reference import gather_rows, sum_rows

__all__ = [
  'Plan',
  'bucket_by_destination',
  'combine',
  'dispatch',
  'padded_rows',
  'sort_by_destination',
  'spread_rows',
  'sum_rows',
]

# T tokens  D width  K choices a token  R rows  E destinations

_BACKENDS: dict[str, ModuleType] = {'triton': triton, 'xla': reference}


def padded_rows(num_choices: int, num_destinations: int, multiple: int) -> int:
  """R that always suffices when every destination starts on a multiple of `multiple` rows."""
  # at most min(E, choices) destinations have rows, and each wastes at most multiple - 1
  rows = num_choices + min(num_destinations, num_choices) * (multiple - 1)
  return -(-rows // multiple) * multiple


@jax.named_scope('sort')
def sort_by_destination(
  destination_TK: Int[Array, 'T K'],
  *,
  num_destinations: int,
  num_rows: int,
  multiple: int = 1,
  implementation: str | None = None,
) -> Plan:
  """Lays choices out by destination, tokens in order within each. Time is linear in T * K.

  Args:
    destination_TK: destination of each choice; `num_destinations` for a choice that goes nowhere.
    num_rows: R; at least as many as there are choices that go somewhere, gaps included
      (`padded_rows`).
    multiple: destinations start on multiples of this many rows.
    implementation: 'triton', which counts, or 'xla', which sorts. None takes the fastest that can.
  """
  backend = _BACKENDS[
    pallas_triton.choose('sort_by_destination', implementation, pallas_triton.unavailable())
  ]
  flat = destination_TK.reshape(-1).astype(jnp.int32)
  rank, size_E = backend.ranks(flat, num_destinations)
  offset_E = _first_rows(size_E, multiple)
  row = offset_E.at[flat].get(mode='clip') + rank
  row = jnp.where(flat < num_destinations, row, num_rows)
  return _plan(row.reshape(destination_TK.shape), num_rows, size_E, offset_E)


def _first_rows(size_E: Array, multiple: int) -> Array:
  """padded_offsets as one masked sum, where a cumsum would be four kernels."""
  taken_E = -(-size_E // multiple) * multiple
  e = jnp.arange(size_E.shape[0])
  return jnp.where(e[:, None] > e, taken_E, 0).sum(1, dtype=jnp.int32)


def bucket_by_destination(visits_TE: Bool[Array, 'T E']) -> Plan:
  """Lays tokens out in one bucket of T rows for each destination, filled from the front."""
  T, E = visits_TE.shape
  place_TE = jnp.cumsum(visits_TE, axis=0, dtype=jnp.int32) - 1
  row_TE = jnp.where(visits_TE, jnp.arange(E) * T + place_TE, E * T)
  return _plan(row_TE, E * T, visits_TE.sum(0, dtype=jnp.int32), jnp.arange(E) * T)


def _plan(row_TK: Array, num_rows: int, size_E: Array, offset_E: Array) -> Plan:
  choice = jnp.arange(row_TK.size, dtype=jnp.int32)
  choice_R = jnp.full_like(choice, row_TK.size, shape=(num_rows,))
  choice_R = choice_R.at[row_TK.reshape(-1)].set(choice, mode='drop', unique_indices=True)
  return Plan(choice_R, row_TK, size_E, offset_E)


@jax.named_scope('spread')
def spread_rows(
  x_TD: Float[Array, 'T D'], plan: Plan, *, multiple: int = 1, implementation: str | None = None
) -> Float[Array, 'R D']:
  """Each token in the rows of its choices. Not differentiable.

  Args:
    multiple: gaps behind a destination's rows are zero up to this multiple of rows; what other
      unused rows hold is left open.
  """
  name = pallas_triton.choose('spread_rows', implementation, pallas_triton.unavailable())
  return _BACKENDS[name].spread_rows(x_TD, plan, multiple=multiple)


def _no_gradient(tree):
  return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), tree)


@jax.custom_vjp
def dispatch(x_TD: Float[Array, 'T D'], plan: Plan) -> Float[Array, 'R D']:
  """Copies each token into the rows of its choices; unused rows are zero."""
  return gather_rows(x_TD, plan.token_R)


def _dispatch_fwd(x_TD, plan):
  return dispatch(x_TD, plan), plan


def _dispatch_bwd(plan, dy_RD):
  return sum_rows(dy_RD, plan.row_TK), _no_gradient(plan)


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(
  y_RD: Float[Array, 'R D'], weight_TK: Float[Array, 'T K'], plan: Plan
) -> Float[Array, 'T D']:
  """Sums each token's rows by weight, in float32, returned in y's dtype."""
  return sum_rows(y_RD, plan.row_TK, weight_TK)


def _combine_fwd(y_RD, weight_TK, plan):
  return combine(y_RD, weight_TK, plan), (y_RD, weight_TK, plan)


def _combine_bwd(saved, dout_TD):
  y_RD, weight_TK, plan = saved
  dout_RD = gather_rows(dout_TD, plan.token_R).astype(jnp.float32)
  dy_RD = (dout_RD * plan.by_row(weight_TK.astype(jnp.float32))[:, None]).astype(y_RD.dtype)
  # unused rows of y may hold NaN: by_choice never reads them
  dweight_TK = plan.by_choice((y_RD.astype(jnp.float32) * dout_RD).sum(1))
  return dy_RD, dweight_TK.astype(weight_TK.dtype), _no_gradient(plan)


combine.defvjp(_combine_fwd, _combine_bwd)
