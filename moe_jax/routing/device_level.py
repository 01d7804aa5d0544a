"""DeepSeek-V2's device-level balance loss."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.routing.base import Gate, Idea, State, normalized, sequence_mean

# B batch  S sequence  E experts  G devices, neighbouring experts on each


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceLevel(Idea):
  """weight * sum_d f'_d P'_d on each sequence: devices are to be busy alike, experts need not be.

  f'_d is the mean over the device's experts of f_i = E / (K T) * (tokens that choose i), without
  gradient; P'_d is the sum of their mean affinities, normalised to sum to one for a token.

  Source: arXiv:2401.06066, equations 15 to 17; arXiv:2405.04434, equations 26 to 28, weight 0.05.
  The value is tested against an independent computation.
  """

  name: ClassVar[str] = 'device_level'
  weight: float = 0.05
  num_devices: int = 8

  def check(self, moe: MoEConfig) -> None:
    check_devices(self.name, self.num_devices, moe)

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    f_BE = sequence_mean(gate.selected_BSE, gate.valid_BS) * (gate.num_experts / gate.top_k)
    f_BG = by_device(f_BE, self.num_devices).mean(-1)
    p_BE = sequence_mean(normalized(gate.score_BSE), gate.valid_BS)
    p_BG = by_device(p_BE, self.num_devices).sum(-1)
    return self.weight * (f_BG * p_BG).sum(-1).mean()


def by_device(value_E: Float[Array, '... E'], num_devices: int) -> Float[Array, '... G E/G']:
  """Splits the last dim into that of devices and that of the experts of one."""
  return value_E.reshape(*value_E.shape[:-1], num_devices, -1)


def check_devices(name: str, num_devices: int, moe: MoEConfig) -> None:
  """Raises ValueError where the experts do not spread evenly over the devices."""
  if num_devices < 1 or moe.num_experts % num_devices:
    raise ValueError(
      f'routing.{name}.num_devices={num_devices} must divide '
      f'model.moe.num_experts={moe.num_experts}: devices hold equally many. Choose a divisor.'
    )
