"""The definition of SwiGLU and its gradient on gate and up side by side in one array."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# R rows  F width of gate and of up


def swiglu(gate: jax.Array, up: jax.Array, *, limit: float = 0.0) -> jax.Array:
  """silu(gate) * up; with a `limit`, gate is at most that, and up within plus and minus that."""
  if limit:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return jax.nn.silu(gate) * up


def forward(h_R2F: jax.Array, *, limit: float) -> jax.Array:
  """swiglu of the two halves, in float32, rounded once."""
  gate_RF, up_RF = halves(h_R2F)
  return swiglu(gate_RF, up_RF, limit=limit).astype(h_R2F.dtype)


def backward(
  da_RF: jax.Array, h_R2F: jax.Array, weight_R: jax.Array, *, limit: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of weight * f(swiglu(h)), given da = the gradient of f alone.

  Returns the gradient in h; weight * swiglu(h), the left operand of the gradient in f's matrix; and
  the gradient in the weight, float32. At the limit itself a gradient still passes.
  """
  dgate, dup, a, dweight_R = gradients(da_RF, *halves(h_R2F), weight_R[:, None], limit=limit)
  dh_R2F = jnp.concatenate([dgate, dup], axis=1).astype(h_R2F.dtype)
  return dh_R2F, a.astype(da_RF.dtype), dweight_R.sum(1)


def halves(h_R2F: jax.Array) -> tuple[jax.Array, jax.Array]:
  f = h_R2F.shape[1] // 2
  return h_R2F[:, :f].astype(jnp.float32), h_R2F[:, f:].astype(jnp.float32)


def gradients(
  da: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  weight: jax.Array,
  *,
  limit: float,
  sigmoid: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Elementwise, in float32: the gradients in gate and up, weight * a, and a * da."""
  da = da.astype(jnp.float32)
  gate_passes, up_passes = gate <= limit, jnp.abs(up) <= limit
  if limit:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  share = sigmoid(gate)
  silu = gate * share
  weighted = da * weight
  dgate, dup = weighted * up * (share + silu * (1 - share)), weighted * silu
  if limit:
    dgate, dup = jnp.where(gate_passes, dgate, 0), jnp.where(up_passes, dup, 0)
  a = silu * up
  return dgate, dup, a * weight, a * da
