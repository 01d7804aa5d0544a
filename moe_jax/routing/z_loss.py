"""The router z-loss."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.base import Gate, Idea, State, sequence_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZLoss(Idea):
  """weight * mean over tokens of logsumexp(logits)^2: keeps router logits small.

  The mean is taken within each sequence, then over sequences, so that micro-batches add up exactly
  where one has more padding than another.

  Source: ST-MoE, arXiv:2202.08906, equation 5; weight 1e-3 there. The value is tested against an
  independent computation.
  """

  name: ClassVar[str] = 'z_loss'
  weight: float = 1e-3

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    square_BS1 = jnp.square(jax.nn.logsumexp(gate.logits_BSE, axis=-1, keepdims=True))
    return self.weight * sequence_mean(square_BS1, gate.valid_BS).mean()
