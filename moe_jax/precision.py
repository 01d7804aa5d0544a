"""Dtype policies: what each kind of value is held and multiplied in."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.config import PRECISIONS


@dataclasses.dataclass(frozen=True)
class Policy:
  """Master weights, optimizer, router, norms, softmax and loss are float32 under every policy."""

  name: str
  activations: jnp.dtype  # the residual stream, and the operands of matrix products
  matmul: str  # jax's matmul precision for float32 operands

  def cast(self, weight: jax.Array) -> jax.Array:
    return weight.astype(self.activations)


_POLICIES = {
  # 'highest' keeps GPUs from rounding float32 operands to TF32
  'float32': Policy('float32', jnp.dtype('float32'), 'highest'),
  'bfloat16': Policy('bfloat16', jnp.dtype('bfloat16'), 'default'),
}
assert set(_POLICIES) == set(PRECISIONS)


def policy(name: str) -> Policy:
  return _POLICIES[name]
