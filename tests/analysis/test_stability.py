"""Spikes in curves made by hand."""

import numpy as np

from moe_jax.analysis.stability import stability


def curve(n=400, seed=0):
  """A loss that falls from 10 to 3 with noise of 0.02."""
  rng = np.random.default_rng(seed)
  return 3 + 7 * np.exp(-np.arange(n) / 60) + 0.02 * rng.normal(size=n)


def test_a_calm_run_has_no_spike_although_its_loss_falls_fast():
  found = stability(curve(), np.ones(400))
  assert (found.loss_spikes, found.grad_spikes, found.not_finite) == (0, 0, 0)


def test_a_spike_of_several_steps_counts_once_and_two_apart_twice():
  loss = curve()
  loss[200:203] += 0.5
  loss[300] += 0.5
  found = stability(loss, np.ones(400))
  assert found.loss_spikes == 2 and found.loss_spikes_per_10k == 50


def test_a_new_level_is_one_spike_and_not_one_a_step():
  loss = curve()
  loss[200:] += 1.0
  assert stability(loss, np.ones(400)).loss_spikes == 1


def test_gradients_ten_times_the_median_are_spikes_and_what_is_not_finite_counts_apart():
  loss, norm = curve(), np.ones(400)
  norm[[100, 250]] = 10.5, 9.5
  loss[300] = np.nan
  found = stability(loss, norm)
  assert (found.loss_spikes, found.grad_spikes, found.not_finite) == (0, 1, 1)
