"""The gate's matrix product: float32 in its accuracy, bfloat16 in its speed.

A rounded score sends a token elsewhere, so the gate is a float32 product under every policy. Its
activations are bfloat16 already; the float32 router is the exact sum of three bfloat16 parts, and
products of bfloat16 are exact in float32. Three tensor-core products with float32 sums then err as
one float32 product does, at a fraction of its time.
"""

# B batch  S sequence  D model  E experts

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.named_scope('gate')
def gate_logits(x_BSD: Float[Array, 'B S D'], router_DE: Float[Array, 'D E']) -> Array:
  """x @ router in float32; gradients likewise, that of x rounded to its dtype.

  Args:
    x_BSD: bfloat16, or float32, which is multiplied as it is.
    router_DE: float32, whole on each device.
  """
  if x_BSD.dtype != jnp.bfloat16:
    return jnp.einsum('bsd,de->bse', x_BSD.astype(jnp.float32), router_DE, precision='highest')
  return _logits(x_BSD, router_DE)


@jax.custom_vjp
def _logits(x_BSD: jax.Array, router_DE: jax.Array) -> jax.Array:
  parts_DE3 = jnp.concatenate(_split(router_DE, 3), axis=1)
  logits_BS3 = jnp.einsum('bsd,de->bse', x_BSD, parts_DE3, preferred_element_type=jnp.float32)
  return _sum_parts(logits_BS3)


def _forward(x_BSD, router_DE):
  return _logits(x_BSD, router_DE), (x_BSD, router_DE)


def _backward(kept, dlogits_BSE):
  x_BSD, router_DE = kept
  d0, d1, d2 = _split(dlogits_BSE, 3)
  r0, r1, _ = _split(router_DE, 3)
  # dx is rounded to 8 bits: the three largest of the products are plenty
  left_BS3 = jnp.concatenate([d0, d1, d0], axis=-1)
  right_DE3 = jnp.concatenate([r0, r0, r1], axis=-1)
  dx_BSD = jnp.einsum('bse,de->bsd', left_BS3, right_DE3, preferred_element_type=jnp.float32)
  parts_BS3 = jnp.concatenate([d0, d1, d2], axis=-1)
  drouter_DE3 = jnp.einsum(
    'bsd,bse->de',
    x_BSD,
    parts_BS3,
    preferred_element_type=jnp.float32,
    out_sharding=_sharding(router_DE),
  )
  return dx_BSD.astype(x_BSD.dtype), _sum_parts(drouter_DE3)


_logits.defvjp(_forward, _backward)


def _split(a: jax.Array, parts: int) -> list[jax.Array]:
  """bfloat16 arrays whose sum is `a`, but for what 8 * parts bits cannot hold."""
  found = []
  for _ in range(parts):
    # a convert to bfloat16 and back would be optimised away
    top = jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
    found.append(top.astype(jnp.bfloat16))
    a = a - top
  return found


def _sum_parts(a_X3: jax.Array) -> jax.Array:
  """The three parts of the last dimension added, the smallest first."""
  top, middle, low = jnp.split(a_X3, 3, axis=-1)
  return low + middle + top


def _sharding(a: jax.Array):
  sharding = jax.typeof(a).sharding
  return None if sharding.mesh.empty else sharding
