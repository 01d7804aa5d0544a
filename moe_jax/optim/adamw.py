"""AdamW as the family trains with it: float32 moments, decay on matrices only."""

from typing import Any

import jax
import optax

from moe_jax.config import OptimConfig
from moe_jax.optim.schedules import schedule

# of norms, attention sinks, and what hyper-connections add without looking at the streams
_KEPT = ('weight_D', 'sink_H', 'base_X', 'scale_3', 'base_J', 'scale_1')


def decays(params: Any) -> Any:
  """True for what weight decay applies to: matrices, not the scales and offsets named above."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in _KEPT, params)


def adamw(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
  """Source: arXiv:1711.05101. Gradients come in already clipped."""
  return optax.adamw(
    schedule(cfg, steps),
    b1=cfg.b1,
    b2=cfg.b2,
    eps=cfg.eps,
    weight_decay=cfg.weight_decay,
    mask=decays,
  )
