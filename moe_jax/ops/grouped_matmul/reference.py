"""The definition of a grouped matmul: every expert multiplies its own rows, in float32."""

# R rows  D in  F out  E experts  K contracted  N columns of the result

import jax
import jax.numpy as jnp

from moe_jax.ops.quantize import Quantized, dequantize_blocks, dequantize_rows


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


def forward_fp8(x: Quantized, w: Quantized, offsets_E: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """x[r] @ w[e].T of the numbers that rows [R, K] and blocks [E, N, K] stand for, in float32."""
  w_EKN = jnp.swapaxes(dequantize_blocks(w), 1, 2)
  return forward(dequantize_rows(x), w_EKN, offsets_E, sizes_E)


def weight_grad_fp8(
  x: Quantized, dy: Quantized, offsets_E: jax.Array, sizes_E: jax.Array
) -> jax.Array:
  """x[rows of e].T @ dy[rows of e] of columns [D, R] and [F, R], in float32."""
  x_DR, dy_RF = dequantize_rows(x), dequantize_rows(dy).T
  row_R = jnp.arange(x_DR.shape[1])

  def expert(start: jax.Array, size: jax.Array) -> jax.Array:
    own_DR = jnp.where((row_R >= start) & (row_R < start + size), x_DR, 0)
    return jnp.matmul(own_DR, dy_RF, precision='highest')

  return jnp.stack([expert(*group) for group in zip(offsets_E, sizes_E, strict=True)])
