"""Default MoE: experts that a token does not visit answer with their average output."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.routing.base import Gate, Idea, Seen, Sizes, State

# L layers  B batch  S sequence  D model  E experts  K experts a token


@dataclasses.dataclass(frozen=True, kw_only=True)
class DefaultExpert(Idea):
  """Adds sum of s_i * default_i over the experts not chosen, so that the router's gradient is
  dense.

  default_i is an exponential moving average of expert i's outputs; it carries no gradient, its
  weight s_i (the softmax of the logits) does. The average is that of the steps before, not of the
  batch in hand, whose tokens are still to be predicted.

  Source: Panda et al. 2025, arXiv:2504.12463, section 3 (Default MoE); decay 0.9. Tested: the
  router gets a gradient from every expert, and the average follows the outputs.
  """

  name: ClassVar[str] = 'default_expert'
  reads_outputs: ClassVar[bool] = True
  decay: float = 0.9

  def check(self, moe: MoEConfig) -> None:
    if not 0 <= self.decay < 1:
      raise ValueError(
        f'routing.default_expert.decay={self.decay} must lie in [0, 1). It is a decay.'
      )

  def init(self, key: jax.Array, sizes: Sizes) -> State:
    return {'default_ED': jnp.zeros((sizes.num_experts, sizes.d_model))}

  def fill(self, gate: Gate, state: State) -> Float[Array, 'B S D']:
    missing_BSE = jax.nn.softmax(gate.logits_BSE, axis=-1) * (1 - gate.selected_BSE)
    return jnp.einsum('bse,ed->bsd', missing_BSE, state['default_ED'])

  def measure(self, gate: Gate, state: State) -> State:
    hot_BSKE = jax.nn.one_hot(gate.expert_BSK, gate.num_experts, dtype=gate.output_BSKD.dtype)
    hot_BSKE = jnp.where(gate.valid_BS[..., None, None], hot_BSKE, 0)
    output_BSKD = jax.lax.stop_gradient(gate.output_BSKD)
    sum_ED = jnp.einsum(
      'bske,bskd->ed', hot_BSKE, output_BSKD, preferred_element_type=jnp.float32,
      out_sharding=jax.P(None, None),
    )  # fmt: skip
    return {'output_ED': sum_ED, 'count_E': hot_BSKE.astype(jnp.float32).sum((0, 1, 2))}

  def update(self, state: State, seen: Seen) -> State:
    count_LE1 = seen.sums['count_E'][..., None]
    mean_LED = seen.sums['output_ED'] / jnp.maximum(count_LE1, 1)
    moved_LED = self.decay * state['default_ED'] + (1 - self.decay) * mean_LED
    # an expert that no token visited keeps its average
    return {'default_ED': jnp.where(count_LE1 > 0, moved_LED, state['default_ED'])}
