"""Auxiliary-loss-free balancing: a bias in the selection, moved against each expert's overload."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.routing.base import Idea, Seen, State

RULES = ('sign', 'proportional')

# L layers  E experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossFree(Idea):
  """After every step b += rate * sign(mean load - load); b chooses experts and never weighs them.

  With `rule='proportional'` b += rate * (mean load - load) / mean load: the paper's variant, here
  with the error relative to the mean so that `rate` does not depend on the batch's size.

  Source: Wang et al. 2024, arXiv:2408.15664, Algorithm 1; rate 1e-3 there and in DeepSeek-V3, and
  section 4.3 for the proportional rule. Tested: both steps against their formulas, the rate's fall
  and that loads even out; its table 2 (MaxVio 0.04 against 0.72 of the auxiliary loss, at a loss no
  worse) is the experiment of docs/balance.

  A bias that jumps to the end is evaluated mid-jump: from `decay_from` of the run on the rate falls
  linearly to zero. V3 stops the bias for its last thirtieth (arXiv:2412.19437, section 4.2).
  """

  name: ClassVar[str] = 'loss_free'
  rate: float = 1e-3
  rule: str = 'sign'
  decay_from: float = 1.0  # of the run

  def check(self, moe: MoEConfig) -> None:
    if self.rule not in RULES:
      raise ValueError(
        f'routing.loss_free.rule={self.rule!r} is not one of {", ".join(RULES)}. Choose one.'
      )
    if not 0 <= self.decay_from <= 1:
      raise ValueError(
        f'routing.loss_free.decay_from={self.decay_from} must lie in [0, 1], a share of the run. '
        'Leave it at 1 for a constant rate.'
      )

  def update_bias(
    self, bias_LE: Float[Array, 'L E'], state: State, seen: Seen
  ) -> Float[Array, 'L E']:
    rate = self.rate
    if self.decay_from < 1:
      rate *= jnp.clip((1 - seen.progress) / (1 - self.decay_from), 0.0, 1.0)
    if self.rule == 'proportional':
      return bias_LE - rate * seen.excess_LE
    load_LE = seen.load_LE
    return bias_LE + rate * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)
