"""What a balancing idea may do. Every hook is optional; an idea overrides the ones it needs.

choose      which experts a token goes to         limit    which of these choices are dropped
loss        a term of the training loss           fill     what is added to the layer's output
init        what is carried from step to step     measure  sums over tokens of the whole batch
update      the new carried values after a step   update_bias  the new selection bias
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import MoEConfig

# L layers  B batch  S sequence  D model  E experts  K experts a token

State = dict[str, jax.Array]  # of one layer; with a leading L where layers are stacked


class Gate(NamedTuple):
  """What the router of one layer sees and decides, for every token of a (micro-)batch.

  A choice may go nowhere: it is then the expert E, one past the last.
  """

  logits_BSE: Float[Array, 'B S E']  # float32
  score_BSE: Float[Array, 'B S E']  # float32 affinities, before any bias
  valid_BS: Bool[Array, 'B S']  # false for padding
  token_BS: Int[Array, 'B S']  # token ids
  bias_E: Float[Array, 'E']  # selection bias
  router_DE: Float[Array, 'D E']  # the router's matrix
  top_k: int
  # the experts chosen, bias included, before any is dropped; there after `choose`
  expert_BSK: Int[Array, 'B S K'] = None  # pyright: ignore[reportAssignmentType]
  # what each chosen expert made of the token, unweighted; only for ideas that ask for it
  output_BSKD: Float[Array, 'B S K D'] = None  # pyright: ignore[reportAssignmentType]

  @property
  def num_experts(self) -> int:
    return self.logits_BSE.shape[-1]

  @property
  def selected_BSE(self) -> Float[Array, 'B S E']:
    """1 where a token chose an expert, else 0; padding chooses too."""
    return selected(self.expert_BSK, self.num_experts)

  @property
  def load_E(self) -> Float[Array, 'E']:
    """Valid tokens that chose each expert, over all devices."""
    return over_tokens(self.selected_BSE, self)


class Seen(NamedTuple):
  """What the layers saw in one step, summed over every token, device and micro-batch."""

  load_LE: Float[Array, 'L E']  # tokens that chose each expert
  sums: State  # what the idea's own `measure` returned, [L, ...]
  top_k: int
  progress: Float[Array, ''] | float = 0.0  # of the run, in [0, 1]

  @property
  def excess_LE(self) -> Float[Array, 'L E']:
    """Load over the layer's mean load, less 1; 0 for a perfect balance."""
    return self.load_LE / jnp.maximum(self.load_LE.mean(-1, keepdims=True), 1e-9) - 1


class Sizes(NamedTuple):
  """Of a layer, for `init`."""

  num_experts: int
  top_k: int
  d_model: int
  vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Idea:
  """Base of every balancing idea; its fields are what a config may set.

  To add one: write a file in moe_jax/routing with a subclass that has a `name`. Nothing else.
  """

  name: ClassVar[str] = ''
  # `loss` wants the sums of `measure` over the whole batch, in its `state`; with micro-batches that
  # takes a forward pass before the others
  counts_first: ClassVar[bool] = False
  # `choose` needs tokens that come later: evaluation and decoding take the top_k scores instead
  training_only: ClassVar[bool] = False
  reads_outputs: ClassVar[bool] = False  # wants `gate.output_BSKD`
  caveat: ClassVar[str] = ''  # said once when a run starts

  def check(self, moe: MoEConfig) -> None:
    """Raises ValueError, one line, for a layer that this idea cannot serve."""

  def init(self, key: jax.Array, sizes: Sizes) -> State:
    """What one layer carries from step to step. Checkpointed; a refused step does not change it."""
    return {}

  def choose(self, gate: Gate, state: State) -> tuple[Int[Array, 'B S K'], Array | None]:
    """Experts of every token and their float32 weights; None weighs by the scores, as usual.

    K may differ from `top_k`. At most one idea of a combination chooses.
    """
    raise NotImplementedError

  def limit(self, gate: Gate, state: State) -> Int[Array, 'B S K']:
    """`gate.expert_BSK` with E for every choice that is dropped. Only in training."""
    return gate.expert_BSK

  def fill(self, gate: Gate, state: State) -> Float[Array, 'B S D'] | None:
    """Added to the output of the routed experts."""
    return None

  def loss(self, gate: Gate, state: State) -> Float[Array, '']:
    """Weighted loss of one layer, a mean over sequences, so that micro-batches average to it."""
    return jnp.zeros((), jnp.float32)

  def measure(self, gate: Gate, state: State) -> State:
    """Sums over the tokens of a (micro-)batch that `loss` or `update` need."""
    return {}

  def update(self, state: State, seen: Seen) -> State:
    """What the layers, stacked, carry into the next step."""
    return state

  def update_bias(
    self, bias_LE: Float[Array, 'L E'], state: State, seen: Seen
  ) -> Float[Array, 'L E']:
    """The next selection bias; `state` is already updated. At most one idea moves the bias."""
    return bias_LE

  def does(self, hook: str) -> bool:
    """Whether this idea has a `hook` of its own."""
    return getattr(type(self), hook) is not getattr(Idea, hook)


def selected(expert_BSK: Int[Array, 'B S K'], num_experts: int) -> Float[Array, 'B S E']:
  """1 where a token selects an expert, else 0."""
  return jax.nn.one_hot(expert_BSK, num_experts, dtype=jnp.float32).sum(-2)


def over_tokens(value_BSE: Float[Array, 'B S E'], gate: Gate) -> Float[Array, 'E']:
  """Sum over the valid tokens of all devices."""
  return jnp.where(gate.valid_BS[..., None], value_BSE, 0).sum((0, 1))


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


def batch_balance(
  load_E: Float[Array, 'E'], affinity_BSE: Float[Array, 'B S E'], gate: Gate
) -> Float[Array, '']:
  """E * sum_i f_i P_i with f_i the share of `load_E` and P_i the mean affinity for i.

  P is a mean over sequences of their means, so that micro-batches average to the whole batch.
  """
  share_E = jax.lax.stop_gradient(load_E / jnp.maximum(load_E.sum(), 1))
  p_E = sequence_mean(affinity_BSE, gate.valid_BS).mean(0)
  return gate.num_experts * (share_E * p_E).sum()


def normalized(score_BSE: Float[Array, 'B S E']) -> Float[Array, 'B S E']:
  """Scores of a token to sum to one."""
  return score_BSE / (score_BSE.sum(-1, keepdims=True) + 1e-20)
