"""Expert choice: experts take tokens, instead of tokens experts."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.routing.base import Gate, Idea, State

# B batch  S sequence  E experts  K slots of a token


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoice(Idea):
  """Each expert takes the K T / E tokens of a sequence that score highest for it: exact balance.

  A token may be taken by many experts or none; at most `max_experts` of them, the highest-scoring,
  count (0: twice top_k), which bounds memory; the paper caps them too (section 4.4). Weights are
  the scores. Choosing within one sequence, not the batch, makes the choice independent of mesh and
  micro-batches.

  NOT CAUSAL: whether an expert takes a token depends on the tokens behind it, which a language
  model is about to predict, so the training loss is too good. Evaluation and decoding cannot look
  ahead: there each token takes its top_k experts, and the validation loss is honest.

  Source: Zhou et al. 2022, arXiv:2202.09368, section 3.2. Tested: its claim of perfect balance with
  a varying number of experts a token, and that the leak is there in training and not in evaluation.
  """

  name: ClassVar[str] = 'expert_choice'
  training_only: ClassVar[bool] = True
  caveat: ClassVar[str] = (
    'expert_choice is not causal: in training an expert picks among tokens that come later. '
    'Compare validation losses, where each token takes its top_k experts.'
  )
  max_experts: int = 0

  def choose(self, gate: Gate, state: State) -> tuple[Int[Array, 'B S K'], None]:
    num_B = jnp.ceil(gate.valid_BS.sum(-1) * gate.top_k / gate.num_experts)
    score_BSE = jax.lax.stop_gradient(gate.score_BSE)
    taken_BSE = highest(jnp.where(gate.valid_BS[..., None], score_BSE, -jnp.inf), num_B)
    slots = min(self.max_experts or 2 * gate.top_k, gate.num_experts)
    return experts_of(taken_BSE, score_BSE, slots), None


def highest(value_BSE: Float[Array, 'B S E'], num_B: Float[Array, 'B']) -> Bool[Array, 'B S E']:
  """Whether a value is among the `num_B` largest of its row and expert; ties at the bar all are.

  -inf never is.
  """
  ranked_BSE = -jnp.sort(-value_BSE, axis=1)
  at_B11 = jnp.clip(num_B.astype(jnp.int32) - 1, 0, value_BSE.shape[1] - 1)[:, None, None]
  at_B1E = jnp.broadcast_to(at_B11, (value_BSE.shape[0], 1, value_BSE.shape[2]))
  bar_B1E = jnp.take_along_axis(ranked_BSE, at_B1E, axis=1)
  return (value_BSE >= bar_B1E) & (value_BSE > -jnp.inf) & (num_B > 0)[:, None, None]


def experts_of(
  taken_BSE: Bool[Array, 'B S E'], score_BSE: Float[Array, 'B S E'], slots: int
) -> Int[Array, 'B S K']:
  """The experts marked for each token, highest score first; E in the slots that stay empty."""
  best_BSK, expert_BSK = jax.lax.top_k(jnp.where(taken_BSE, score_BSE, -jnp.inf), slots)
  return jnp.where(best_BSK > -jnp.inf, expert_BSK, score_BSE.shape[-1])
