"""Sizes and tokens for given compute budgets: the rows of a scaling-law sweep."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments import flags as config_flags
from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.config import RunConfig
from moe_jax.train import cost
from moe_jax.train.state import init_variables, make_model
from sweeps.space import Overrides


class Size(NamedTuple):
  total: int  # parameters
  active: int  # of these, used by one token
  flops_per_token: float  # forward and backward


def size_of(cfg: RunConfig) -> Size:
  """Counts a model without making it."""
  make = functools.partial(init_variables, make_model(cfg))
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    params = jax.eval_shape(make, jax.random.key(0))['params']
  total, active = cost.published(cost.parameters(cfg.model, params))
  flops = cost.flops_per_token(cfg.model, params, cfg.data.sequence_length)
  return Size(total, active, flops)


def isoflop(
  config: str,
  budgets: Sequence[float],
  sizes: Sequence[Mapping[str, Any]],
  *,
  tokens_per_parameter: tuple[float, float] = (2.0, 200.0),
  least_steps: int = 20,
) -> Iterator[Overrides]:
  """Every size at every budget at which it makes sense: size and steps, their product the budget.

  Args:
    config: FILE:ARG, which gives all that a size leaves open.
    budgets: FLOPs of a run, forward and backward, as `cost.flops_per_token` counts them.
    sizes: overrides of the model, and what goes with its size such as a learning rate.
    tokens_per_parameter: tokens for each active parameter; combinations outside are left out.
    least_steps: so are runs shorter than this, which are mostly warm-up.
  """
  file, _, arg = config.partition(':')
  measured = []
  for overrides in sizes:
    raw = config_flags.load(file, arg)
    with raw.unlocked():
      raw.update_from_flattened_dict(dict(overrides))
    cfg = config_io.build(raw.to_dict())
    measured.append((overrides, cfg, size_of(cfg)))
  for budget in budgets:
    for overrides, cfg, size in measured:
      steps = round(budget / (size.flops_per_token * cfg.tokens_per_step))
      per_parameter = steps * cfg.tokens_per_step / size.active
      low, high = tokens_per_parameter
      if steps >= least_steps and low <= per_parameter <= high:
        yield {**overrides, 'steps': steps}


def nearest_budget(flops: float, budgets: Sequence[float]) -> float:
  """The budget that a run was planned for: its steps are whole numbers."""
  return min(budgets, key=lambda budget: abs(math.log(flops / budget)))
