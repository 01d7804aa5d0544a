"""AdamW as the family trains with it: float32 moments, decay on matrices only."""

from typing import Any

import jax
import optax

from moe_jax.config import OptimConfig
from moe_jax.optim.schedules import schedule


def decays(params: Any) -> Any:
  """True for what weight decay applies to: all but the norms' weight_D and bias_D."""
  norms = ('weight_D', 'bias_D')
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in norms, params)


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
