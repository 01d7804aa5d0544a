"""The auxiliary loss of the Switch Transformer."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from moe_jax.routing.base import Gate, Idea, State, batch_balance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switch(Idea):
  """weight * E * sum_i f_i P_i: f_i the share of choices that are i, P_i its mean softmax.

  Switch sends a token to one expert; with more, f is the share of all their choices, which the
  paper's is for top_k=1. The batch is the whole one, over devices and micro-batches: Switch took
  each device's. P is the softmax of the logits whatever `model.moe.score` is.

  Source: arXiv:2101.03961, equations 4 to 6; weight 1e-2 there. The value is tested against an
  independent computation, and that it is 1 for uniform routing, as the paper says.
  """

  name: ClassVar[str] = 'switch'
  counts_first: ClassVar[bool] = True
  weight: float = 1e-2

  def measure(self, gate: Gate, state: State) -> State:
    return {'load_E': gate.load_E}

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    p_BSE = jax.nn.softmax(gate.logits_BSE, axis=-1)
    return self.weight * batch_balance(state['load_E'], p_BSE, gate)
