"""Planned runs cost what they were planned for."""

import pytest

from experiments.flags import load
from moe_jax import config_io
from sweeps import scaling
from sweeps.budget import isoflop, nearest_budget, size_of
from tests.run.program import CONFIG


def spent(overrides, config):
  """FLOPs of a row."""
  raw = load(*config.split(':'))
  raw.update_from_flattened_dict(overrides)
  cfg = config_io.build(raw.to_dict())
  return size_of(cfg).flops_per_token * cfg.tokens_per_step * cfg.steps


def test_steps_spend_the_budget():
  sizes = [{'model.d_model': 16}, {'model.d_model': 32}]
  rows = list(isoflop(str(CONFIG), [1e9, 1e10], sizes, tokens_per_parameter=(0, 1e9)))
  assert len(rows) == 4
  for row, budget in zip(rows, [1e9, 1e9, 1e10, 1e10], strict=True):
    flops = spent(row, str(CONFIG))
    # steps are whole, and at least 20
    assert flops == pytest.approx(budget, rel=1 / 40)
    assert nearest_budget(flops, [1e9, 1e10]) == budget


def test_combinations_without_sense_are_left_out():
  sizes = [{'model.d_model': 16}]
  assert list(isoflop(str(CONFIG), [1e6], sizes, tokens_per_parameter=(0, 1e9))) == []
  assert list(isoflop(str(CONFIG), [1e10], sizes, tokens_per_parameter=(1e5, 1e9))) == []


def test_the_sweep_has_at_least_three_sizes_for_each_budget():
  rows = list(scaling.sweep())
  found = [nearest_budget(spent(row, scaling.CONFIG), scaling.BUDGETS) for row in rows]
  assert all(found.count(budget) >= 3 for budget in scaling.BUDGETS)
