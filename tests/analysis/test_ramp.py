import numpy as np
import pytest

from moe_jax.analysis.ramp import breaks_at, numbers, smooth, table

FLAT, STAIR = 60, 20
RATE_N = np.concatenate([np.full(FLAT, 1e-3), np.repeat([2e-3, 4e-3, 8e-3], STAIR)])


def record_of(wild_from: int) -> dict[str, np.ndarray]:
  """Gradient norms of 1, and of 3 from a step on."""
  grad_N = np.where(np.arange(len(RATE_N)) >= wild_from, 3.0, 1.0)
  return {'train/lm_loss': np.linspace(9, 5, 120), 'train/grad_norm': grad_N, 'train/lr': RATE_N}


def test_smooth_is_the_mean_of_the_steps_so_far_and_of_nine_at_most():
  value_N = np.arange(20.0)
  want_N = [value_N[max(i - 8, 0) : i + 1].mean() for i in range(20)]
  np.testing.assert_allclose(smooth(value_N), want_N)


@pytest.mark.parametrize(
  ('change', 'step'),
  [({}, None), ({70: 9.0}, None), (dict.fromkeys(range(80, 120), 3.0), 87)],
  ids=['calm', 'one spike', 'three times as large'],
)
def test_a_run_breaks_where_the_median_gradient_norm_doubles(change, step):
  grad_N = np.ones(len(RATE_N))
  grad_N[list(change)] = list(change.values())
  assert breaks_at(grad_N, RATE_N) == step


def test_a_run_that_is_not_finite_has_broken():
  grad_N = np.where(np.arange(len(RATE_N)) >= 100, np.nan, 1.0)
  assert breaks_at(grad_N, RATE_N) == 100


def test_a_run_that_never_broke_has_the_last_learning_rate():
  found = numbers(record_of(len(RATE_N)))
  assert not found['broke'] and found['broke_at_lr'] == pytest.approx(8e-3)


def test_table_compares_with_no_balancing_seed_by_seed():
  row = table({'none': {0: record_of(70)}, 'aux 1e-3': {0: record_of(90)}}).splitlines()[-1]
  assert '0.0040 ' in row and '+100%' in row
