import numpy as np
import pytest

from moe_jax.analysis.ramp import breaks_at, numbers, smooth, table

FALLING_N = np.linspace(9.0, 5.0, 200)


def record_of(loss_N) -> dict[str, np.ndarray]:
  rate_N = np.arange(1, len(loss_N) + 1) * 1e-4
  return {'train/lm_loss': loss_N, 'train/grad_norm': np.ones(len(loss_N)), 'train/lr': rate_N}


def test_smooth_is_the_mean_of_the_steps_so_far_and_of_nine_at_most():
  value_N = np.arange(20.0)
  want_N = [value_N[max(i - 8, 0) : i + 1].mean() for i in range(20)]
  np.testing.assert_allclose(smooth(value_N), want_N)


@pytest.mark.parametrize(
  ('then', 'step'),
  [(np.full(40, 5.1), None), (np.full(40, 7.0), 202), (np.full(40, np.nan), 200)],
  ids=['noise', 'rise of 2 nats', 'not finite'],
)
def test_a_run_breaks_where_its_smoothed_loss_is_half_a_nat_above_its_lowest(then, step):
  assert breaks_at(np.concatenate([FALLING_N, then])) == step


def test_a_run_that_never_broke_has_the_last_learning_rate():
  found = numbers(record_of(FALLING_N))
  assert not found['broke'] and found['broke_at_lr'] == pytest.approx(0.02)


def test_table_compares_with_no_balancing_seed_by_seed():
  broken = record_of(np.concatenate([FALLING_N, np.full(40, 9.0)]))
  later = record_of(np.concatenate([FALLING_N, np.full(20, 5.0), np.full(20, 9.0)]))
  row = table({'none': {0: broken}, 'aux 1e-3': {0: later}}).splitlines()[-1]
  assert '1 of 1' in row and '+10%' in row
