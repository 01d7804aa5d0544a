"""SimBal: a router whose columns are orthonormal keeps similar tokens together and spreads
others."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.base import Gate, Idea, State

# D model  E experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimBal(Idea):
  """weight * sum |R^T R - I| of the router's matrix R [D, E]; loads play no part.

  Source: Omi, Sen and Farhadi 2025, arXiv:2506.14038, section 3. Tested: the value and gradient
  against the definition, and that the router's columns become orthonormal.
  """

  name: ClassVar[str] = 'simbal'
  weight: float = 0.1

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    gram_EE = jnp.einsum('de,df->ef', gate.router_DE, gate.router_DE, precision='highest')
    return self.weight * jnp.abs(gram_EE - jnp.eye(gate.num_experts)).sum()
