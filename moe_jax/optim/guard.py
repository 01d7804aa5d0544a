"""Whether a step may change anything: its loss and gradient norm must be finite and ordinary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import GuardConfig

# a flat window would otherwise call the smallest rise an outlier
_LEAST_RELATIVE_SIGMA = 0.01


class GuardState(NamedTuple):
  """The window holds accepted samples only: a refused one would make room for the next."""

  samples_W2: jax.Array  # float32 (loss, gradient norm), a ring
  accepted: jax.Array  # int32 samples ever accepted
  streak: jax.Array  # int32 steps refused in a row
  skipped: jax.Array  # int32 steps refused in all
  rollbacks: jax.Array  # int32 returns to a checkpoint so far

  @staticmethod
  def create(cfg: GuardConfig) -> 'GuardState':
    zero = jnp.zeros((), jnp.int32)
    return GuardState(jnp.zeros((cfg.window, 2), jnp.float32), zero, zero, zero, zero)


def judge(
  state: GuardState, loss: jax.Array, grad_norm: jax.Array, cfg: GuardConfig
) -> tuple[jax.Array, GuardState]:
  """Returns whether to accept the step, and the guard after it.

  A sample is accepted when both numbers are finite and, once `min_samples` have been accepted, at
  most `sigmas` deviations above the window's mean.
  """
  sample_2 = jnp.stack([loss, grad_norm]).astype(jnp.float32)
  window = cfg.window
  filled_W1 = (jnp.arange(window) < state.accepted)[:, None]
  count = jnp.clip(state.accepted, 1, window)
  mean_2 = jnp.where(filled_W1, state.samples_W2, 0).sum(0) / count
  square_2 = jnp.where(filled_W1, jnp.square(state.samples_W2 - mean_2), 0).sum(0)
  sigma_2 = jnp.maximum(jnp.sqrt(square_2 / count), _LEAST_RELATIVE_SIGMA * jnp.abs(mean_2))
  ordinary = (sample_2 <= mean_2 + cfg.sigmas * sigma_2).all()
  ok = jnp.isfinite(sample_2).all() & (ordinary | (state.accepted < cfg.min_samples))

  # where, not multiplication: zero times NaN is NaN
  pushed_W2 = state.samples_W2.at[state.accepted % window].set(sample_2)
  refused = (~ok).astype(jnp.int32)
  return ok, GuardState(
    samples_W2=jnp.where(ok, pushed_W2, state.samples_W2),
    accepted=state.accepted + 1 - refused,
    streak=(state.streak + 1) * refused,
    skipped=state.skipped + refused,
    rollbacks=state.rollbacks,
  )
