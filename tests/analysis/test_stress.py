"""Spikes and divergence under a high learning rate."""

import numpy as np
import pytest

from moe_jax.analysis.stress import diverged, numbers, saved, table, verdict

# N steps


def record(*, loss_spikes_at=(), grad_spikes_at=()):
  """A calm run of 250 steps, but for its spikes."""
  rng = np.random.default_rng(0)
  loss_N, grad_N = 5 + 0.01 * rng.normal(size=250), 1 + 0.1 * rng.uniform(size=250)
  loss_N[list(loss_spikes_at)] += 1
  grad_N[list(grad_spikes_at)] *= 20
  more = {'train/lr': np.linspace(0.1, 0.35, 250, endpoint=False), 'router/max_vio': np.ones(250)}
  return {'train/lm_loss': loss_N, 'train/grad_norm': grad_N} | more


def test_a_run_diverges_that_ends_above_where_it_was_or_is_not_finite():
  falling_N = np.linspace(9, 4, 250)
  assert not diverged(falling_N)
  assert diverged(np.concatenate([falling_N, np.full(40, 5.0)]))
  assert diverged(np.where(np.arange(250) == 100, np.nan, falling_N))


def test_spikes_of_loss_and_gradient_are_counted():
  found = numbers(record(loss_spikes_at=[100], grad_spikes_at=[120, 180]))
  assert (found['loss_spikes'], found['grad_spikes']) == (1, 2)


def test_the_rate_of_the_first_spike_is_that_of_the_last_step_where_there_is_none():
  found = [numbers(record(grad_spikes_at=at))['lr_of_first_spike'] for at in ([120, 180], [])]
  assert found == pytest.approx([0.22, 0.349])


def test_what_balancing_saves_is_relative_to_the_run_of_the_same_seed_without():
  half, whole = record(grad_spikes_at=[120]), record(grad_spikes_at=[120, 180])
  runs = {'none': {0: whole, 1: whole}, 'a': {0: half, 1: half}, 'b': {0: half, 1: half}}
  assert saved(runs) == pytest.approx((0.5, 0.5, 0.5))
  assert 'saves 50% of the spikes (50% to 50%): the claim of 15% holds' in verdict(runs)
  assert '| none | 2 | 0 ± 0 | 80 ± 0 | 0 | 0 of 2 |' in table(runs)


def test_a_calm_baseline_leaves_nothing_to_save():
  calm = record()
  assert saved({'none': {0: calm}, 'a': {0: calm}}) is None
  assert 'nothing is left' in verdict({'none': {0: calm}, 'a': {0: calm}})
