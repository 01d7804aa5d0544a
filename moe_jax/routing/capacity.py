"""Capacity: an expert, or a device, takes only so many choices of a sequence; the rest are
dropped."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_jax.config import MoEConfig
from moe_jax.routing.base import Gate, Idea, State
from moe_jax.routing.device_level import check_devices
from moe_jax.routing.expert_choice import highest

# B batch  S sequence  E experts  K experts a token  G devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity(Idea):
  """Drops the choices of lowest score where a sequence has more than factor * K T / E for an
  expert.

  Goes with any other idea: `loss_free+capacity`. A dropped choice adds nothing to its token, whose
  other experts keep their weights; loads still count it, so that balancing sees the demand. With
  `num_devices` the bound is a device's, factor * K T / num_devices, over its experts together.
  Sequences drawn by a hash of their tokens are exempt, a share `exempt_fraction` of them.
  Evaluation and decoding drop nothing. A group of tokens, in GShard's words, is a sequence, so
  neither mesh nor micro-batches change what is dropped.

  Source: GShard, arXiv:2006.16668, section 2.2 (per expert); DeepSeek-V2, arXiv:2405.04434, section
  2.1.4 (per device, factor 1, lowest scores first, about a tenth exempt). Tested: no expert exceeds
  its bound and what is dropped scores lowest.
  """

  name: ClassVar[str] = 'capacity'
  factor: float = 1.25
  num_devices: int = 0  # 0: each expert has its own bound
  exempt_fraction: float = 0.0

  def check(self, moe: MoEConfig) -> None:
    if self.num_devices:
      check_devices(self.name, self.num_devices, moe)
    if self.factor <= 0:
      raise ValueError(f'routing.capacity.factor={self.factor} must be positive. V2 has 1.0.')
    if not 0 <= self.exempt_fraction < 1:
      raise ValueError(
        f'routing.capacity.exempt_fraction={self.exempt_fraction} must lie in [0, 1). V2 has 0.1.'
      )

  def limit(self, gate: Gate, state: State) -> Int[Array, 'B S K']:
    (B, S, E), G = gate.logits_BSE.shape, self.num_devices or gate.num_experts
    wants_BSE = (gate.selected_BSE > 0) & gate.valid_BS[..., None]
    score_BSE = jnp.where(wants_BSE, jax.lax.stop_gradient(gate.score_BSE), -jnp.inf)
    # the choices of a device, of all its experts and tokens, in one row
    by_group = score_BSE.reshape(B, S, G, E // G).swapaxes(2, 3).reshape(B, S * (E // G), G)
    num_B = jnp.ceil(self.factor * gate.top_k * gate.valid_BS.sum(-1) / G)
    kept = highest(by_group, num_B).reshape(B, S, E // G, G).swapaxes(2, 3).reshape(B, S, E)
    kept_BSE = kept | self._exempt(gate)[:, None, None] | ~gate.valid_BS[..., None]
    at_BSK = jnp.minimum(gate.expert_BSK, E - 1)
    return jnp.where(jnp.take_along_axis(kept_BSE, at_BSK, axis=-1), gate.expert_BSK, E)

  def _exempt(self, gate: Gate) -> jax.Array:
    """Whether a sequence is; by its tokens, so the same everywhere."""
    place_S = jnp.arange(gate.token_BS.shape[1], dtype=jnp.uint32) * 2 + 1
    mixed_B = (gate.token_BS.astype(jnp.uint32) * place_S).sum(-1) * jnp.uint32(2654435769)
    return (mixed_B >> 8).astype(jnp.float32) * 2.0**-24 < self.exempt_fraction
