"""Rounding to bfloat16 up or down by chance, so that sums of small changes are right on average."""

import math

import jax
import jax.numpy as jnp

# float32 has 16 more bits of mantissa than bfloat16, which is its upper half
_LOW = 16


def stochastic_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
  """Rounds float32 to a neighbour in bfloat16, up with the probability of the distance passed.

  Args:
    bits: uint32 of x's shape; the low 16 bits are used and must be uniform.

  Infinities and NaN stay what they are; a value above the largest bfloat16 may become infinite.
  """
  raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
  raised = (raw + (bits & 0xFFFF)) >> _LOW << _LOW
  rounded = jax.lax.bitcast_convert_type(jnp.where(jnp.isfinite(x), raised, raw), jnp.float32)
  return rounded.astype(jnp.bfloat16)


def hashed_bits(like: jax.Array, seed: jax.Array) -> jax.Array:
  """uint32 of `like`'s shape and sharding, a function of each element's place and of `seed`.

  A few integer operations an element that fuse with what reads them; a cryptographic generator
  would cost more than the optimizer itself. Places repeat after 2^32 elements. Source: the
  finalizer of MurmurHash3 (Appleby), twice.
  """
  place = jnp.zeros((), jnp.uint32)
  for dim in range(like.ndim):
    stride = math.prod(like.shape[dim + 1 :]) % 2**32
    index = jax.lax.broadcasted_iota(
      jnp.uint32, like.shape, dim, out_sharding=jax.typeof(like).sharding
    )
    place = place + index * jnp.uint32(stride)
  return _mix(_mix(place) ^ seed)


def _mix(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
