"""Paired comparisons use equal seeds only, and say when a difference is noise."""

import numpy as np
import pytest

from moe_jax.analysis import compare

NONE = {0: 4.0, 1: 4.5, 2: 3.5}


def title(figure):
  return ' '.join(figure.get_suptitle().split())


def test_differences_are_those_of_equal_seeds():
  found = compare.paired({2: 3.4, 0: 3.9, 1: 4.4, 7: 0.0}, NONE)
  np.testing.assert_allclose(found.difference_N, [-0.1] * 3)
  assert found.differs
  assert found.half_width == pytest.approx(0, abs=1e-12)


def test_the_interval_is_students():
  found = compare.paired({0: 4.1, 1: 4.8, 2: 3.7}, NONE)
  # t(0.975, 2) = 4.3027; standard deviation 0.1 of 0.1, 0.3, 0.2
  assert found.half_width == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
  assert str(found) == '+0.200 +- 0.248'
  assert not found.differs


def test_one_seed_has_no_interval_and_none_in_common_is_refused():
  assert not compare.paired({0: 1.0}, NONE).differs
  assert str(compare.paired({0: 3.0}, NONE)) == '-1.000'
  with pytest.raises(ValueError, match='no seed in common'):
    compare.paired({9: 1.0}, NONE)


def test_the_title_tells_noise_from_a_difference():
  noisy = {0: 4.1, 1: 4.4, 2: 3.5}
  clear = {s: v + 0.2 + s / 1000 for s, v in NONE.items()}
  vio = {'none': dict.fromkeys(range(3), 5.0), 'a': dict.fromkeys(range(3), 0.5)}
  figure = compare.paired_figure({'none': NONE, 'a': noisy}, vio, baseline='none')
  assert 'a ends with MaxVio 0.50 where none has 5.00' in title(figure)
  assert 'within noise (3 seeds)' in title(figure)
  figure = compare.paired_figure({'none': NONE, 'a': clear}, vio, baseline='none')
  assert 'at a higher loss (+0.201' in title(figure)


def test_curves_title_names_the_lowest_end():
  falling = np.linspace(3, 1, 50)
  curves = {'none': {0: falling + 1, 1: falling + 1.2}, 'a': {0: falling}}
  figure = compare.curves_figure(np.arange(50), curves, 'loss', baseline='none')
  # one seed in common tells nothing of noise
  assert title(figure) == 'Loss ends lowest with a, 1.08; none has 2.18, within noise'
  curves['a'][1] = falling + 0.1
  figure = compare.curves_figure(np.arange(50), curves, 'loss', baseline='none')
  assert title(figure) == 'Loss ends lowest with a, 1.13; none has 2.18'
