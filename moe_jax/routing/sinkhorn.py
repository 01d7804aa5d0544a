"""Sinkhorn routing (S-BASE): top-k of a balanced transport plan."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.routing.base import Gate, Idea, State

# B batch  S sequence  E experts  K experts a token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinkhorn(Idea):
  """The logits' matrix of a sequence is scaled until tokens and experts have equal mass; top-k of
  it.

  exp(logits / temperature) is scaled by rows to sum to 1 and by columns to sum to T / E, over and
  over; the plan only chooses, and the scores weigh. The plan is a sequence's, not the batch's,
  which makes it independent of mesh and micro-batches. As it looks ahead, evaluation and decoding
  take the top_k scores, as S-BASE does.

  Source: Clark et al. 2022, arXiv:2202.01169, section 3.2 and appendix B (S-BASE, top-1), after
  BASE layers, arXiv:2103.16716. Tested: rows and columns of the plan, and that it spreads skewed
  logits.
  """

  name: ClassVar[str] = 'sinkhorn'
  training_only: ClassVar[bool] = True
  caveat: ClassVar[str] = (
    'sinkhorn looks ahead: in training a choice depends on the whole sequence. Compare validation '
    'losses, where each token takes its top_k experts.'
  )
  num_iterations: int = 8
  temperature: float = 1.0

  def choose(self, gate: Gate, state: State) -> tuple[Int[Array, 'B S K'], None]:
    logits_BSE = jax.lax.stop_gradient(gate.logits_BSE) / self.temperature
    plan_BSE = sinkhorn_log(logits_BSE, gate.valid_BS, num_iterations=self.num_iterations)
    return jax.lax.top_k(plan_BSE, gate.top_k)[1], None


def sinkhorn_log(
  logits_BSE: Float[Array, 'B S E'], valid_BS: jax.Array, *, num_iterations: int
) -> Float[Array, 'B S E']:
  """Logarithm of the plan: rows sum to 1, columns to T / E the nearer the more iterations."""
  valid_BS1 = valid_BS[..., None]
  log_share_B11 = jnp.log(jnp.maximum(valid_BS1.sum(1, keepdims=True), 1) / logits_BSE.shape[-1])
  for _ in range(num_iterations):
    masked_BSE = jnp.where(valid_BS1, logits_BSE, -jnp.inf)
    mass_B1E = jax.nn.logsumexp(masked_BSE, axis=1, keepdims=True)
    # a row of padding alone has no mass to scale
    logits_BSE -= jnp.where(mass_B1E > -jnp.inf, mass_B1E - log_share_B11, 0)
    logits_BSE -= jax.nn.logsumexp(logits_BSE, axis=-1, keepdims=True)
  return logits_BSE
