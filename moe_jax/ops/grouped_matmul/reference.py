"""The definition of a grouped matmul: every expert multiplies its own rows, in float32."""

# R rows  D in  F out  E experts

import jax
import jax.numpy as jnp


def forward(
  x_RD: jax.Array, w_EDF: jax.Array, offsets_E: jax.Array, sizes_E: jax.Array
) -> jax.Array:
  """Row r of expert e, offsets[e] <= r < offsets[e] + sizes[e], becomes x[r] @ w[e]; others zero.

  A row of no expert may hold anything, NaN included: it is selected away before the product (its
  gradient is zero) and after it (its cotangent is never read).
  """
  row_R1 = jnp.arange(x_RD.shape[0])[:, None]
  y_RF = jnp.zeros((x_RD.shape[0], w_EDF.shape[2]), jnp.float32)
  for e in range(w_EDF.shape[0]):
    mine_R1 = (row_R1 >= offsets_E[e]) & (row_R1 < offsets_E[e] + sizes_E[e])
    own_RD = jnp.where(mine_R1, x_RD.astype(jnp.float32), 0)
    product_RF = jnp.matmul(own_RD, w_EDF[e].astype(jnp.float32), precision='highest')
    y_RF += jnp.where(mine_R1, product_RF, 0)
  return y_RF.astype(x_RD.dtype)
