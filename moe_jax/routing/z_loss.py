"""The router z-loss."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.base import Gate, Idea


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZLoss(Idea):
  """weight * mean over tokens of logsumexp(logits)^2: keeps router logits small.

  Source: ST-MoE, arXiv:2202.08906, equation 5; weight 1e-3 there.
  """

  name: ClassVar[str] = 'z_loss'
  weight: float = 1e-3

  def loss(self, gate: Gate) -> Float[Array, '']:
    square_BS = jnp.square(jax.nn.logsumexp(gate.logits_BSE, axis=-1))
    count = jnp.maximum(gate.valid_BS.sum(), 1)
    return self.weight * jnp.where(gate.valid_BS, square_BS, 0).sum() / count
