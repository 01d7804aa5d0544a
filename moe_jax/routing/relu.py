"""ReLU routing (ReMoE): an expert is active where its gate is above zero."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.routing.base import Gate, Idea, Seen, Sizes, State, sequence_balance
from moe_jax.routing.expert_choice import experts_of

# L layers  B batch  S sequence  E experts  K slots of a token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relu(Idea):
  """relu(logits) are the weights, with no top-k: differentiable everywhere. A loss keeps them
  sparse.

  The loss is lambda * sum_i f_i * mean_t relu(x_ti), an L1 norm that presses harder on crowded
  experts; after a step lambda is multiplied or divided by `alpha`, as more or fewer than top_k
  experts a token were active on average over all layers. At most `max_experts` (0: twice top_k),
  the largest, count for a token: the paper has no bound, and early in training half of all experts
  are active.

  Source: Wang, Zhu and Chen 2024, arXiv:2412.14711, equations 3 to 9; lambda 1e-8 at first and
  alpha 1.2 as in its released code. Tested: its figure of sparsity converging to the target, and
  the gradient.
  """

  name: ClassVar[str] = 'relu'
  alpha: float = 1.2
  lambda_start: float = 1e-8
  max_experts: int = 0

  def check(self, moe: MoEConfig) -> None:
    if self.alpha <= 1 or self.lambda_start <= 0:
      raise ValueError(
        f'routing.relu: alpha={self.alpha} must be above 1 and lambda_start={self.lambda_start} '
        'above 0. The paper has 1.2 and 1e-8.'
      )

  def init(self, key: jax.Array, sizes: Sizes) -> State:
    return {'lambda': jnp.full((), self.lambda_start)}

  def choose(self, gate: Gate, state: State) -> tuple[Int[Array, 'B S K'], Float[Array, 'B S K']]:
    E = gate.num_experts
    slots = min(self.max_experts or 2 * gate.top_k, E)
    expert_BSK = experts_of(gate.logits_BSE > 0, gate.logits_BSE, slots)
    chosen_BSK = jnp.take_along_axis(gate.logits_BSE, jnp.minimum(expert_BSK, E - 1), axis=-1)
    return expert_BSK, jnp.where(expert_BSK < E, chosen_BSK, 0)

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    active_BSE = (gate.logits_BSE > 0).astype(jnp.float32)
    return state['lambda'] * sequence_balance(active_BSE, jax.nn.relu(gate.logits_BSE), gate)

  def measure(self, gate: Gate, state: State) -> State:
    active_BS = (gate.logits_BSE > 0).sum(-1)
    return {
      'active': jnp.where(gate.valid_BS, active_BS, 0).sum().astype(jnp.float32),
      'tokens': gate.valid_BS.sum().astype(jnp.float32),
    }

  def update(self, state: State, seen: Seen) -> State:
    active = seen.sums['active'].sum() / jnp.maximum(seen.sums['tokens'].sum(), 1)
    return {'lambda': state['lambda'] * self.alpha ** jnp.sign(active - seen.top_k)}
