"""Learning rates at the corners of every schedule."""

import numpy as np
import pytest

from moe_jax.config import OptimConfig
from moe_jax.optim import schedule

PEAK = 2e-3


def rates(steps=100, **fields):
  learning_rate = schedule(OptimConfig(lr_peak=PEAK, **fields), steps)
  return np.array([float(learning_rate(i)) for i in range(steps + 1)]) / PEAK


@pytest.mark.parametrize('kind', ['constant', 'cosine', 'steps', 'wsd'])
def test_warm_up_rises_from_its_first_share_to_the_peak(kind):
  rate = rates(schedule=kind, warmup_steps=10)
  np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
  np.testing.assert_allclose(rate[10], 1, rtol=1e-6)


@pytest.mark.parametrize('warmup', [0, 1])
@pytest.mark.parametrize('kind', ['constant', 'cosine', 'steps', 'wsd'])
def test_without_warm_up_the_first_step_is_at_the_peak(kind, warmup):
  np.testing.assert_allclose(rates(schedule=kind, warmup_steps=warmup)[0], 1, rtol=1e-6)


@pytest.mark.parametrize('kind', ['constant', 'cosine', 'steps', 'wsd'])
def test_a_run_shorter_than_its_warm_up_only_rises(kind):
  rate = rates(5, schedule=kind, warmup_steps=10)
  assert (np.diff(rate[:5]) > 0).all()
  assert rate.max() <= 1 + 1e-6


def test_constant_stays_at_the_peak():
  np.testing.assert_allclose(rates(schedule='constant', warmup_steps=10)[10:], 1, rtol=1e-6)


def test_cosine_is_halfway_in_the_middle_and_ends_at_its_share():
  rate = rates(schedule='cosine', warmup_steps=20, lr_end_fraction=0.1)
  np.testing.assert_allclose(rate[20 + 40], 0.55, rtol=1e-5)
  np.testing.assert_allclose(rate[100], 0.1, rtol=1e-5)
  assert (np.diff(rate[20:]) < 0).all()


def test_steps_drop_at_their_shares_of_all_steps():
  rate = rates(schedule='steps', warmup_steps=10, step_fractions=(0.6, 0.9), step_factor=0.316)
  np.testing.assert_allclose(rate[10:60], 1, rtol=1e-6)
  np.testing.assert_allclose(rate[61:90], 0.316, rtol=1e-5)
  np.testing.assert_allclose(rate[91:], 0.316**2, rtol=1e-5)


def test_steps_drop_exactly_where_the_share_is_done():
  rate = rates(schedule='steps', warmup_steps=0, step_fractions=(0.5,), step_factor=0.5)
  np.testing.assert_allclose(rate[[49, 50]], [1, 0.5], rtol=1e-6)


def test_wsd_is_flat_then_linear_to_its_end():
  rate = rates(schedule='wsd', warmup_steps=10, decay_fraction=0.2, lr_end_fraction=0.1)
  np.testing.assert_allclose(rate[10:81], 1, rtol=1e-6)
  np.testing.assert_allclose(rate[90], 0.55, rtol=1e-5)
  np.testing.assert_allclose(rate[100], 0.1, rtol=1e-5)
  np.testing.assert_allclose(np.diff(rate[80:], n=2), 0, atol=1e-6)


def test_a_schedule_config_refuses_is_not_reached_here():
  with pytest.raises(ValueError, match=r"optim\.schedule='triangle' is not one of constant"):
    OptimConfig(schedule='triangle')
