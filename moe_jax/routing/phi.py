"""phi-balancing: balance of the population, by mirror descent on its expected routing."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.routing.base import Gate, Idea, Seen, Sizes, State, sequence_mean

POTENTIALS = ('entropy', 'square')

# L layers  B batch  S sequence  E experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi(Idea):
  """weight * <mean p, grad phi(m)>: m is a moving average of the mean softmax, without gradient.

  phi is a convex potential of the expected routing, smallest for a uniform one: `entropy`, sum m
  log m, or `square`, E/2 sum m^2. The average stands for the population where a batch is too small
  to.

  Source: Li et al. 2026, arXiv:2605.15403, section 3; the loss's form and the decay come from its
  abstract and secondary descriptions. Tested: the gradient presses on what the average says is
  crowded.
  """

  name: ClassVar[str] = 'phi'
  weight: float = 1e-2
  decay: float = 0.9
  potential: str = 'entropy'

  def check(self, moe: MoEConfig) -> None:
    if self.potential not in POTENTIALS:
      raise ValueError(
        f'routing.phi.potential={self.potential!r} is not one of {", ".join(POTENTIALS)}. '
        'Choose one.'
      )

  def init(self, key: jax.Array, sizes: Sizes) -> State:
    return {'mean_E': jnp.full((sizes.num_experts,), 1 / sizes.num_experts)}

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    mean_E = state['mean_E']
    entropy = self.potential == 'entropy'
    slope_E = jnp.log(mean_E + 1e-20) + 1 if entropy else gate.num_experts * mean_E
    p_E = sequence_mean(jax.nn.softmax(gate.logits_BSE, axis=-1), gate.valid_BS).mean(0)
    return self.weight * (jax.lax.stop_gradient(slope_E) * p_E).sum()

  def measure(self, gate: Gate, state: State) -> State:
    p_BSE = jax.lax.stop_gradient(jax.nn.softmax(gate.logits_BSE, axis=-1))
    return {'p_E': jnp.where(gate.valid_BS[..., None], p_BSE, 0).sum((0, 1))}

  def update(self, state: State, seen: Seen) -> State:
    p_LE = seen.sums['p_E']
    share_LE = p_LE / jnp.maximum(p_LE.sum(-1, keepdims=True), 1e-9)
    return {'mean_E': self.decay * state['mean_E'] + (1 - self.decay) * share_LE}
