"""Several balancing ideas as one: what a layer and the training step ask for."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.routing.base import Gate, Idea, Seen, State

# L layers  B batch  S sequence  D model  E experts  K experts a token

States = dict[str, State]  # by the idea's name; ideas that carry nothing are left out


@dataclasses.dataclass(frozen=True)
class Balance:
  """A combination of ideas, in the order given; () is plain top-k. Hashable, so a model holds it.

  Args:
    training: whether tokens are routed to train; ideas that look ahead or drop tokens do so only
      then.
  """

  ideas: tuple[Idea, ...] = ()
  training: bool = False

  def to_train(self) -> 'Balance':
    return dataclasses.replace(self, training=True)

  def check(self, moe: MoEConfig) -> None:
    """Raises ValueError, one line, for a combination or a layer that cannot work."""
    names = '+'.join(idea.name for idea in self.ideas)
    choose, bias = (
      [idea.name for idea in self.ideas if idea.does(hook)] for hook in ('choose', 'update_bias')
    )
    if len(choose) > 1:
      raise ValueError(f'balance={names!r}: {" and ".join(choose)} both choose. Name one of them.')
    if len(bias) > 1:
      raise ValueError(
        f'balance={names!r}: {" and ".join(bias)} both move the bias. Name one of them.'
      )
    if choose and bias:
      raise ValueError(
        f'balance={names!r}: {choose[0]} chooses the experts itself, so the selection bias of '
        f'{bias[0]} would change nothing. Name one of them.'
      )
    if choose and moe.top_groups != moe.num_groups:
      raise ValueError(
        f'balance={names!r}: {choose[0]} chooses among all experts and cannot keep to '
        f'model.moe.top_groups={moe.top_groups} of {moe.num_groups} groups. Set both to 1.'
      )
    for idea in self.ideas:
      idea.check(moe)

  @property
  def chooser(self) -> Idea | None:
    """The idea that chooses instead of top-k, if one does now."""
    able = [i for i in self.ideas if i.does('choose') and (self.training or not i.training_only)]
    return able[0] if able else None

  @property
  def counts_first(self) -> bool:
    return any(idea.counts_first for idea in self.ideas)

  @property
  def reads_outputs(self) -> bool:
    return any(idea.reads_outputs for idea in self.ideas)

  @property
  def drops(self) -> bool:
    return self.training and any(idea.does('limit') for idea in self.ideas)

  @property
  def carriers(self) -> tuple[Idea, ...]:
    return tuple(idea for idea in self.ideas if idea.does('init'))

  def limit(self, gate: Gate, states: States) -> Int[Array, 'B S K']:
    """The choices that are kept; E for those that are dropped."""
    if self.training:
      for idea in self.ideas:
        gate = gate._replace(expert_BSK=idea.limit(gate, states.get(idea.name, {})))
    return gate.expert_BSK

  def fill(self, gate: Gate, states: States) -> list[Float[Array, 'B S D']]:
    filled = [idea.fill(gate, states.get(idea.name, {})) for idea in self.ideas]
    return [y_BSD for y_BSD in filled if y_BSD is not None]

  def measure(self, gate: Gate, states: States) -> dict[str, jax.Array]:
    """The ideas' sums by 'idea.sum', ready to be added up over micro-batches."""
    return {
      f'{idea.name}.{key}': value
      for idea in self.ideas
      for key, value in idea.measure(gate, states.get(idea.name, {})).items()
    }

  def loss(self, gate: Gate, states: States, sums: Mapping[str, jax.Array]) -> Float[Array, '']:
    """Args: `sums` of the whole batch, as `measure` names them."""
    total = jnp.zeros((), jnp.float32)
    for idea in self.ideas:
      own = own_sums(idea, sums) if idea.counts_first else {}
      total = total + idea.loss(gate, states.get(idea.name, {}) | own)
    return total

  def update(
    self,
    bias_LE: Float[Array, 'L E'],
    states: States,
    load_LE: Float[Array, 'L E'],
    sums: Mapping[str, jax.Array],
    top_k: int,
    progress: Float[Array, ''] | float = 0.0,
  ) -> tuple[Float[Array, 'L E'], States]:
    """The bias and what the ideas carry, after a step that saw these loads and sums.

    Args:
      progress: share of the run that was done before the step.
    """
    new = {}
    for idea in self.ideas:
      seen = Seen(load_LE, own_sums(idea, sums), top_k, progress)
      state = idea.update(states.get(idea.name, {}), seen)
      bias_LE = idea.update_bias(bias_LE, state, seen)
      if idea.name in states:
        new[idea.name] = state
    return bias_LE, new


def own_sums(idea: Idea, sums: Mapping[str, jax.Array]) -> State:
  prefix = f'{idea.name}.'
  return {key.removeprefix(prefix): v for key, v in sums.items() if key.startswith(prefix)}
