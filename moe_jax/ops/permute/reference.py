"""The definition of every move of rows, which XLA also compiles where there is no kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops.permute.plan import Plan

# T tokens  D width  K choices a token  R rows


def gather_rows(x_TD: Array, token_R: Int[Array, 'R']) -> Array:
  """x[token], and zeros for a token that is not there (T or more)."""
  return x_TD.at[token_R].get(mode='fill', fill_value=0)


def spread_rows(x_TD: Array, plan: Plan, *, multiple: int) -> Array:
  """Each token in each of its rows, and zeros in all others."""
  del multiple
  return gather_rows(x_TD, plan.token_R)


@jax.named_scope('combine')
def sum_rows(
  y_RD: Array, row_TK: Int[Array, 'T K'], weight_TK: Float[Array, 'T K'] | None = None
) -> Array:
  """The sum over k of weight[t, k] * y[row[t, k]], in float32, rounded once to y's dtype.

  A row that is not there (R or more) adds nothing; what y holds in rows that nobody names, NaN
  included, does not matter.
  """
  y_TKD = gather_rows(y_RD, row_TK).astype(jnp.float32)
  if weight_TK is None:
    return y_TKD.sum(1).astype(y_RD.dtype)
  return jnp.einsum('tkd,tk->td', y_TKD, weight_TK.astype(jnp.float32)).astype(y_RD.dtype)


def ranks(key_N: Int[Array, 'N'], num_keys: int) -> tuple[Array, Array]:
  """How many equal keys stand before each, and how often each key occurs. Others rank anyhow."""
  order_N = jnp.argsort(key_N, stable=True)
  place_N = jnp.zeros_like(key_N).at[order_N].set(jnp.arange(len(key_N)), unique_indices=True)
  size_E = (key_N[:, None] == jnp.arange(num_keys)).sum(0, dtype=jnp.int32)
  first_E = jnp.cumsum(size_E) - size_E
  return place_N - first_E.at[key_N].get(mode='clip'), size_E
