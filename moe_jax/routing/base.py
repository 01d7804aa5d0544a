"""What a balancing idea is: a loss term, a rule for the selection bias, or both."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# L layers  B batch  S sequence  E experts  K experts a token


class Gate(NamedTuple):
  """What the router of one layer decided, for every token of a (micro-)batch."""

  logits_BSE: Float[Array, 'B S E']  # float32
  score_BSE: Float[Array, 'B S E']  # float32 affinities, before any bias
  expert_BSK: Int[Array, 'B S K']  # the experts chosen, bias included
  valid_BS: Bool[Array, 'B S']  # false for padding

  @property
  def num_experts(self) -> int:
    return self.logits_BSE.shape[-1]

  @property
  def top_k(self) -> int:
    return self.expert_BSK.shape[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Idea:
  """Base of every balancing idea; its fields are what a config may set.

  To add one: write a file in moe_jax/routing with a subclass that has a `name`. Nothing else.
  """

  name: ClassVar[str] = ''

  def loss(self, gate: Gate) -> jax.Array:
    """Weighted loss of one layer, a mean over sequences, so that micro-batches add up."""
    return jnp.zeros((), jnp.float32)

  def update_bias(
    self, bias_LE: Float[Array, 'L E'], load_LE: Float[Array, 'L E']
  ) -> Float[Array, 'L E']:
    """New selection bias from the tokens routed to each expert in the whole global batch."""
    return bias_LE


def selected(expert_BSK: Int[Array, 'B S K'], num_experts: int) -> Float[Array, 'B S E']:
  """1 where a token selects an expert, else 0."""
  return jax.nn.one_hot(expert_BSK, num_experts, dtype=jnp.float32).sum(-2)


def sequence_mean(
  value_BSE: Float[Array, 'B S E'], valid_BS: Bool[Array, 'B S']
) -> Float[Array, 'B E']:
  """Mean over the valid tokens of each sequence; 0 for a sequence of padding alone."""
  count_B1 = jnp.maximum(valid_BS.sum(-1, keepdims=True), 1)
  return jnp.where(valid_BS[..., None], value_BSE, 0).sum(1) / count_B1


def sequence_balance(
  selected_BSE: Float[Array, 'B S E'], affinity_BSE: Float[Array, 'B S E'], gate: Gate
) -> Float[Array, '']:
  """sum_i f_i P_i of every sequence, averaged over sequences.

  f_i = E / (K T) * (tokens that select i) carries no gradient; P_i = mean affinity for i does.
  """
  f_BE = sequence_mean(selected_BSE, gate.valid_BS) * (gate.num_experts / gate.top_k)
  p_BE = sequence_mean(affinity_BSE, gate.valid_BS)
  return (jax.lax.stop_gradient(f_BE) * p_BE).sum(-1).mean()
