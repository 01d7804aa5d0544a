"""Auxiliary-loss-free balancing: a bias in the selection, moved against each expert's overload."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.base import Idea

# L layers  E experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossFree(Idea):
  """b += rate * sign(mean load - load) after every step; b chooses experts and never weighs them.

  Source: Wang et al. 2024, arXiv:2408.15664, Algorithm 1; rate 1e-3 there and in DeepSeek-V3.
  """

  name: ClassVar[str] = 'loss_free'
  rate: float = 1e-3

  def update_bias(
    self, bias_LE: Float[Array, 'L E'], load_LE: Float[Array, 'L E']
  ) -> Float[Array, 'L E']:
    return bias_LE + self.rate * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)
