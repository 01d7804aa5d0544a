"""Dtype policies: what each kind of value is held and multiplied in."""

import dataclasses
from typing import Any

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


# float32 in use under every policy: lookups, gates, norms, and what mixes heads or streams
_HIGH = frozenset({
  'embedding_VD', 'router_DE', 'weight_D', 'bias_D', 'bias_MX', 'sink_H',
  'fn_JDX', 'base_X', 'scale_3', 'scale_1', 'base_J', 'head_DJ', 'weight_DH',
})  # fmt: skip


def compute_copy(policy: Policy, params: Any) -> Any:
  """The parameters as a step multiplies them: weights rounded once, the rest as they are.

  The forward pass of the copy is that of the parameters, bit for bit. Gradients in the copy are in
  compute precision, as what a product gives is rounded to anyway.
  """

  def cast(path: Any, leaf: jax.Array) -> jax.Array:
    return leaf if path[-1].key in _HIGH else policy.cast(leaf)

  return jax.tree_util.tree_map_with_path(cast, params)


_POLICIES = {
  # 'highest' keeps GPUs from rounding float32 operands to TF32
  'float32': Policy('float32', jnp.dtype('float32'), 'highest'),
  'bfloat16': Policy('bfloat16', jnp.dtype('bfloat16'), 'default'),
}
assert set(_POLICIES) == set(PRECISIONS)


def policy(name: str) -> Policy:
  return _POLICIES[name]
