"""The definition of every quantisation, which XLA also compiles where there is no kernel."""

import jax
import jax.numpy as jnp

from moe_jax.ops.quantize.format import TILE, Format, Quantized, magnitude, scale_and_inverse

# R rows  K columns  D, F sides of a matrix


def rows(x_RK: jax.Array, fmt: Format) -> Quantized:
  """A scale for each 128 values of a row."""
  x_RCc = x_RK.astype(jnp.float32).reshape(x_RK.shape[0], -1, TILE)
  scale_RC, inverse_RC = scale_and_inverse(magnitude(x_RCc).max(-1), fmt)
  values = (x_RCc * inverse_RC[..., None]).astype(fmt.dtype)
  return Quantized(values.reshape(x_RK.shape), scale_RC.T)


def columns(x_RK: jax.Array, fmt: Format) -> Quantized:
  """The rows of x transposed: a scale for each 128 values of a column."""
  return rows(x_RK.T, fmt)


def blocks(w_DF: jax.Array, fmt: Format) -> Quantized:
  """A scale for each 128 x 128 values; leading dimensions are free."""
  *lead, d, f = w_DF.shape
  w = w_DF.astype(jnp.float32).reshape(*lead, d // TILE, TILE, f // TILE, TILE)
  scale, inverse = scale_and_inverse(magnitude(w).max((-3, -1)), fmt)
  values = (w * inverse[..., :, None, :, None]).astype(fmt.dtype)
  return Quantized(values.reshape(w_DF.shape), scale)


def through(x: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.Array:
  """x rounded to `dtype`, in its own; a pair of casts would be one that XLA may leave out."""
  if dtype is None:
    return x
  info = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def tensor(x: jax.Array, fmt: Format) -> Quantized:
  x = x.astype(jnp.float32)
  scale, inverse = scale_and_inverse(magnitude(x).max(initial=0), fmt)
  return Quantized((x * inverse).astype(fmt.dtype), scale)


def dequantize_rows(q: Quantized) -> jax.Array:
  """float32 numbers of rows, [R, K], or of columns, [K, R]."""
  return q.values.astype(jnp.float32) * jnp.repeat(q.scale.T, TILE, axis=1)


def dequantize_blocks(q: Quantized) -> jax.Array:
  scale = jnp.repeat(jnp.repeat(q.scale, TILE, axis=-2), TILE, axis=-1)
  return q.values.astype(jnp.float32) * scale


def transpose_blocks(q: Quantized) -> Quantized:
  """The same numbers with the last two dimensions exchanged."""
  return Quantized(jnp.swapaxes(q.values, -1, -2), jnp.swapaxes(q.scale, -1, -2))
