"""GShard's auxiliary loss, and its random second expert."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.routing.base import Gate, Idea, State, over_tokens, selected, sequence_mean

# B batch  S sequence  E experts  K experts a token


@dataclasses.dataclass(frozen=True, kw_only=True)
class GShard(Idea):
  """weight * mean_i (c_i / T) m_i: c_i tokens have i as their first expert, m_i is its mean
  softmax.

  With `random_second`, a token's second expert, of gate weight g2 after the two are normalised, is
  visited with probability min(1, 2 g2) only. The draw is a hash of the score's own bits: it differs
  from step to step and token to token, and is the same on every mesh. GShard's capacity is the idea
  `capacity`: `gshard+capacity`.

  Source: arXiv:2006.16668, algorithm 1 (lines 6 to 17). Tested: the loss against its definition,
  its value 1 / E^2 for uniform routing, and the share of second experts visited.
  """

  name: ClassVar[str] = 'gshard'
  counts_first: ClassVar[bool] = True
  weight: float = 1e-2
  random_second: bool = True

  def check(self, moe: MoEConfig) -> None:
    if moe.top_k != 2:
      raise ValueError(
        f'balance: gshard is defined for model.moe.top_k=2, not {moe.top_k}. Set it to 2, or use '
        'switch.'
      )

  def measure(self, gate: Gate, state: State) -> State:
    first_BSE = selected(gate.expert_BSK[..., :1], gate.num_experts)
    return {'first_E': over_tokens(first_BSE, gate)}

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    share_E = state['first_E'] / jnp.maximum(state['first_E'].sum(), 1)
    p_BSE = jax.nn.softmax(gate.logits_BSE, axis=-1)
    mean_E = sequence_mean(p_BSE, gate.valid_BS).mean(0)
    return self.weight * (jax.lax.stop_gradient(share_E) * mean_E).mean()

  def limit(self, gate: Gate, state: State) -> Int[Array, 'B S K']:
    if not self.random_second:
      return gate.expert_BSK
    p_BSE = jax.nn.softmax(gate.logits_BSE, axis=-1)
    p_BSK = jnp.take_along_axis(p_BSE, gate.expert_BSK, axis=-1)
    share_BS = p_BSK[..., 1] / (p_BSK.sum(-1) + 1e-20)
    kept_BS = 2 * share_BS > uniform_from_bits(p_BSK[..., 1])
    second_BS = jnp.where(kept_BS, gate.expert_BSK[..., 1], gate.num_experts)
    return jnp.stack([gate.expert_BSK[..., 0], second_BS], axis=-1)


def uniform_from_bits(value: Float[Array, '...']) -> Float[Array, '...']:
  """Numbers in [0, 1) that depend on every bit of float32 `value`: a mixing of its bits."""
  bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
    bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
  return (bits >> 8).astype(jnp.float32) * 2.0**-24
