"""DeepSeek-V2's communication balance loss."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.routing.base import Gate, Idea, State, normalized, sequence_mean
from moe_jax.routing.device_level import by_device, check_devices

# B batch  S sequence  E experts  G devices, neighbouring experts on each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Communication(Idea):
  """weight * sum_d f''_d P''_d on each sequence: devices are to receive equally many tokens.

  f''_d = G / (M T) * (tokens sent to device d), one for a token however many of its experts live
  there, without gradient; P''_d is the sum of the mean affinities of the device's experts,
  normalised to sum to one for a token. M, the most devices that a token may visit, is
  `device_limit`.

  Source: arXiv:2405.04434, equations 29 to 31: 8 devices, 3 for a token, weight 0.02. The value is
  tested against an independent computation.
  """

  name: ClassVar[str] = 'communication'
  weight: float = 0.02
  num_devices: int = 8
  device_limit: int = 3

  def check(self, moe: MoEConfig) -> None:
    check_devices(self.name, self.num_devices, moe)
    if not 1 <= self.device_limit <= self.num_devices:
      raise ValueError(
        f'routing.communication.device_limit={self.device_limit} must lie in '
        f'[1, num_devices={self.num_devices}]. Lower it.'
      )

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    sent_BSG = by_device(gate.selected_BSE, self.num_devices).max(-1)
    f_BG = sequence_mean(sent_BSG, gate.valid_BS) * (self.num_devices / self.device_limit)
    p_BE = sequence_mean(normalized(gate.score_BSE), gate.valid_BS)
    p_BG = by_device(p_BE, self.num_devices).sum(-1)
    return self.weight * (f_BG * p_BG).sum(-1).mean()
