"""A balancing loss of our own, and the experiment that tries it; notebook 5 walks through it.

python -m experiments.run --config=notebooks/importance.py --workdir=runs/importance
"""

import dataclasses
from typing import ClassVar

import jax
import ml_collections
from jaxtyping import Array, Float

from experiments.configs import small
from moe_jax.routing.base import Gate, Idea, State, sequence_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance(Idea):
  """weight * CV(importance)^2; importance is an expert's mean share of a sequence's gates.

  Source: Shazeer et al. 2017, arXiv:1701.06538, equations 6 and 7; 0.1 there. The paper sums over a
  batch, we over each sequence.
  """

  name: ClassVar[str] = 'importance'
  weight: float = 0.1

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    share_BSE = gate.score_BSE / gate.score_BSE.sum(-1, keepdims=True)
    importance_BE: jax.Array = sequence_mean(share_BSE, gate.valid_BS)
    cv_B = importance_BE.std(-1) / importance_BE.mean(-1)
    return self.weight * (cv_B**2).mean()


def get_config() -> ml_collections.ConfigDict:
  c = small.get_config()
  c.balance = 'importance'
  return c
