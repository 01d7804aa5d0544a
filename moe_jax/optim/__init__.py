"""Learning-rate schedules, optimizers, and the guard that refuses bad steps."""

import optax

from moe_jax.config import OptimConfig
from moe_jax.optim.adamw import adamw
from moe_jax.optim.freeze import only, trains
from moe_jax.optim.guard import GuardState, judge
from moe_jax.optim.muon import muon
from moe_jax.optim.schedules import schedule

__all__ = ['GuardState', 'adamw', 'judge', 'muon', 'optimizer', 'schedule', 'trains']


def optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
  """The optimizer that `optim.name` asks for, of what `optim.trainable` leaves to train."""
  tx = {'adamw': adamw, 'muon': muon}[cfg.name](cfg, steps)
  return only(tx, cfg.trainable) if cfg.trainable else tx
