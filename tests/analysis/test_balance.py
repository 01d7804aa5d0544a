"""Tables and pictures of balancing methods."""

import numpy as np
import pytest

from moe_jax.analysis import balance

# N steps  L layers  E experts


def record(rng, *, rate: float):
  """Loads that even out by chance, or that lean one way in every step."""
  lean_E = np.zeros(8)
  lean_E[0] = rate
  load_NLE = 1 + lean_E + 0.2 * rng.standard_normal((100, 3, 8))
  return {
    'load_NLE': load_NLE.astype(np.float32),
    'load_LE': load_NLE[-50:].sum(0),
  }


def test_what_is_left_by_chance_falls_as_one_over_the_root_of_steps():
  rng = np.random.default_rng(0)
  steps_N, vio_N = balance.max_vio_by_steps(record(rng, rate=0.0)['load_NLE'])
  assert steps_N[[0, -1]].tolist() == [1, 100]
  assert vio_N[-1] == pytest.approx(vio_N[0] / 10, rel=0.5)


def test_what_leans_one_way_stays():
  _, vio_N = balance.max_vio_by_steps(record(np.random.default_rng(0), rate=1.0)['load_NLE'])
  assert vio_N[-1] == pytest.approx(2 / (9 / 8) - 1, rel=0.1)


def test_last_steps_are_those_of_the_global_max_vio():
  made = record(np.random.default_rng(0), rate=0.5)
  _, vio_N = balance.max_vio_by_steps(made['load_NLE'])
  vio_L = made['load_LE'].max(-1) / made['load_LE'].mean(-1) - 1
  assert vio_N[balance.GLOBAL - 1] == pytest.approx(vio_L.mean(), rel=1e-5)
