"""Learning-rate schedules, optimizers, and the guard that refuses bad steps."""

from moe_jax.optim.adamw import adamw
from moe_jax.optim.freeze import only, trains
from moe_jax.optim.guard import GuardState, judge
from moe_jax.optim.schedules import schedule

__all__ = ['GuardState', 'adamw', 'judge', 'only', 'schedule', 'trains']
