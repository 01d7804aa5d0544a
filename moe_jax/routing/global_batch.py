"""Qwen's load-balancing loss over the global batch."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from moe_jax.routing.base import Gate, Idea, State, batch_balance, normalized


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalBatch(Idea):
  """weight * E * sum_i f_i P_i with f counted over every device and micro-batch of the step.

  Balance within a micro-batch of few sequences forbids experts to specialise: a sequence of code
  must then visit all of them. Over the whole batch it does not. The paper adds counts up as the
  micro-batches pass, so the first sees few; here they are counted before (a forward pass more),
  and the loss is that of one large batch exactly. P is the mean of scores normalised to sum to one.

  Source: Qiu et al. 2025, arXiv:2501.11873, equations 1 to 4. Tested: accumulation over
  micro-batches and devices equals the whole batch, where sequence-level losses differ; its table 1
  is the experiment of docs/balance.
  """

  name: ClassVar[str] = 'global_batch'
  counts_first: ClassVar[bool] = True
  weight: float = 1e-3

  def measure(self, gate: Gate, state: State) -> State:
    return {'load_E': gate.load_E}

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    return self.weight * batch_balance(state['load_E'], normalized(gate.score_BSE), gate)
