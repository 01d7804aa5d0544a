"""Learning-rate schedules, optimizers, and the guard that refuses bad steps."""

import optax

from moe_jax.config import OptimConfig
from moe_jax.optim.adamw import adamw
from moe_jax.optim.freeze import only, trains
from moe_jax.optim.guard import GuardState, judge
from moe_jax.optim.muon import muon
from moe_jax.optim.schedules import schedule

__all__ = ['GuardState', 'adamw', 'judge', 'muon', 'optimizer', 'schedule', 'trains']


def optimizer(cfg: OptimConfig, steps: int, *, seed: int = 0) -> optax.GradientTransformation:
  """The optimizer that `optim.name` asks for, of what `optim.trainable` leaves to train.

  Args:
    seed: of what an optimizer draws, together with the count of its updates.
  """
  tx = {'adamw': adamw, 'muon': muon}[cfg.name](cfg, steps, seed=seed)
  return only(tx, cfg.trainable) if cfg.trainable else tx
