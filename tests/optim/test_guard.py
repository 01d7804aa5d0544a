"""The guard refuses what is not finite or not ordinary, and forgets what it refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import GuardConfig
from moe_jax.optim import GuardState, judge

CFG = GuardConfig(window=8, min_samples=4, sigmas=6.0)
NAN, INF = float('nan'), float('inf')


@functools.partial(jax.jit, static_argnames='cfg')
def step(state, loss, grad_norm, cfg=CFG):
  return judge(state, loss, grad_norm, cfg)


def run(samples, *, state=None, cfg=CFG):
  state, accepted = state or GuardState.create(cfg), []
  for loss, grad_norm in samples:
    ok, state = step(state, jnp.float32(loss), jnp.float32(grad_norm), cfg)
    accepted.append(bool(ok))
  return accepted, state


def ordinary(n, seed=0):
  rng = np.random.default_rng(seed)
  return [(5 + 0.5 * x, 1 + 0.1 * y) for x, y in rng.uniform(-1, 1, (n, 2))]


BAD = pytest.mark.parametrize(
  'bad',
  [(NAN, 1.0), (5.0, NAN), (INF, 1.0), (5.0, INF), (-INF, 1.0), (50.0, 1.0), (5.0, 10.0)],
  ids=['nan_loss', 'nan_norm', 'inf_loss', 'inf_norm', 'minus_inf', 'high_loss', 'high_norm'],
)


@BAD
def test_a_bad_sample_is_refused_and_never_enters_the_window(bad):
  _, before = run(ordinary(10))
  [accepted], after = run([bad], state=before)
  assert not accepted
  np.testing.assert_array_equal(after.samples_W2, before.samples_W2)
  assert after.accepted == before.accepted
  assert (after.streak, after.skipped) == (1, 1)


@BAD
def test_an_ordinary_sample_after_a_bad_one_is_accepted(bad):
  _, state = run([*ordinary(10), bad, bad])
  assert state.streak == 2
  accepted, state = run(ordinary(3, seed=1), state=state)
  assert all(accepted)
  assert (state.streak, state.skipped) == (0, 2)


def test_outliers_pass_until_enough_samples_were_accepted():
  accepted, _ = run([(5.0, 1.0), (5.0, 1.0), (50.0, 1.0)])
  assert accepted == [True, True, True]
  accepted, _ = run([*ordinary(CFG.min_samples), (50.0, 1.0)])
  assert not accepted[-1]


def test_not_finite_is_refused_from_the_first_step():
  assert run([(NAN, 1.0)])[0] == [False]


def test_low_samples_are_never_outliers():
  accepted, _ = run([*ordinary(10), (0.0, 0.0)])
  assert accepted[-1]


def test_a_rise_within_the_sigmas_is_accepted_and_one_beyond_is_not():
  samples = ordinary(CFG.window)
  loss = np.float32([s[0] for s in samples])
  limit = loss.mean() + CFG.sigmas * loss.std()
  assert run([*samples, (limit - 1e-3, 1.0)])[0][-1]
  assert not run([*samples, (limit + 1e-3, 1.0)])[0][-1]


def test_a_flat_window_leaves_room_of_a_hundredth():
  samples = [(5.0, 1.0)] * 10
  assert run([*samples, (5.0 * (1 + 0.01 * CFG.sigmas) - 1e-3, 1.0)])[0][-1]
  assert not run([*samples, (5.0 * (1 + 0.01 * CFG.sigmas) + 1e-3, 1.0)])[0][-1]


def test_the_window_holds_the_newest_accepted_samples():
  samples = ordinary(20)
  accepted, state = run(samples)
  assert all(accepted)
  expected = np.float32(samples[-CFG.window :])
  found = np.sort(np.asarray(state.samples_W2), axis=0)
  np.testing.assert_array_equal(found, np.sort(expected, axis=0))


def test_a_refused_level_shift_is_refused_for_ever():
  accepted, state = run([*ordinary(10), *[(50.0, 1.0)] * 20])
  assert not any(accepted[10:])
  assert state.streak == 20
