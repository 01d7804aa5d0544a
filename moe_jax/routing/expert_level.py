"""DeepSeekMoE's expert-level balance loss."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from moe_jax.routing.base import Gate, Idea, State, normalized, sequence_balance


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertLevel(Idea):
  """weight * sum_i f_i P_i on each sequence, averaged; the experts counted are those chosen.

  P is the mean of scores normalised to sum to one, as the paper's softmax does: without that a
  sigmoid lowers the loss by shrinking all scores alike, and balances nothing.

  The paper leaves open whether f and P run over the batch or a sequence; DeepSeek's released code
  takes sequences, and so does this.

  Source: arXiv:2401.06066, equations 12 to 14; weight 1e-3 for the 16B model. The value is tested
  against an independent computation, and that it spreads the load as the paper claims.
  """

  name: ClassVar[str] = 'expert_level'
  weight: float = 1e-3

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    return self.weight * sequence_balance(gate.selected_BSE, normalized(gate.score_BSE), gate)
