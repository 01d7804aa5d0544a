"""DeepSeek-V3's sequence-wise balance loss."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from moe_jax.routing.base import Gate, Idea, selected, sequence_balance


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceWise(Idea):
  """weight * mean over sequences of sum_i f_i P_i, on scores normalised to sum to one.

  f counts the top-k of the scores without the selection bias, as the paper's formula has it. A
  sequence is a row of the batch, all documents packed in it included.

  Source: arXiv:2412.19437, equations 17 to 20; weight 1e-4 there.
  """

  name: ClassVar[str] = 'sequence_wise'
  weight: float = 1e-4

  def loss(self, gate: Gate) -> Float[Array, '']:
    score_BSE = gate.score_BSE / (gate.score_BSE.sum(-1, keepdims=True) + 1e-20)
    _, expert_BSK = jax.lax.top_k(gate.score_BSE, gate.top_k)
    selected_BSE = selected(expert_BSK, gate.num_experts)
    return self.weight * sequence_balance(selected_BSE, score_BSE, gate)
