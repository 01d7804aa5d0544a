"""DeepSeek-V3's sequence-wise balance loss."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from moe_jax.ops.route import choose_experts
from moe_jax.routing.base import Gate, Idea, State, normalized, selected, sequence_balance


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceWise(Idea):
  """weight * mean over sequences of sum_i f_i P_i, on scores normalised to sum to one.

  f counts the top-k of the scores without the selection bias, as the paper's formula has it. A
  sequence is a row of the batch, all documents packed in it included.

  Source: arXiv:2412.19437, equations 17 to 20; weight 1e-4 there. The value is tested against an
  independent computation.
  """

  name: ClassVar[str] = 'sequence_wise'
  weight: float = 1e-4

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    expert_BSK = choose_experts(gate.score_BSE, k=gate.top_k)
    selected_BSE = selected(expert_BSK, gate.num_experts)
    return self.weight * sequence_balance(selected_BSE, normalized(gate.score_BSE), gate)
