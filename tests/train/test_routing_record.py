"""What evaluation says of the routing, from counts whose answers are known."""

import numpy as np
import pytest

from moe_jax.train.routing_record import (
  Routing,
  coactivation,
  mutual_information,
  overlap,
  saved_steps,
)


def test_information_is_that_of_the_domains_where_each_has_its_own_experts():
  own = np.kron(np.eye(4), np.ones((1, 2)))[None]  # 4 domains, 2 experts each
  shared = np.ones((1, 4, 8))
  np.testing.assert_allclose(mutual_information(own), [2.0])
  np.testing.assert_allclose(mutual_information(shared), [0.0], atol=1e-12)
  np.testing.assert_array_equal(mutual_information(np.zeros((1, 4, 8))), [0.0])


def test_coactivation_is_one_for_inseparable_pairs_and_ignores_dead_experts():
  pairs_EE = np.zeros((6, 6))
  pairs_EE[:2, :2] = 30  # 0 and 1 always together, 2 with 3 or 4 in turn, 5 never
  pairs_EE[2, 2], pairs_EE[3, 3], pairs_EE[4, 4] = 20, 10, 10
  pairs_EE[2, 3] = pairs_EE[3, 2] = pairs_EE[2, 4] = pairs_EE[4, 2] = 10
  np.testing.assert_allclose(coactivation(pairs_EE[None]), [(1 + 1 + 0.5 + 1 + 1) / 5])


def test_overlap_counts_choices_in_any_order():
  now = np.array([[[0, 1], [2, 3]]])
  np.testing.assert_allclose(overlap(now, np.array([[[1, 0], [3, 4]]])), [0.75])


def record(seed=0) -> Routing:
  rng = np.random.default_rng(seed)
  load_LGE = rng.integers(0, 9, (2, 3, 4)).astype(np.float32)
  pairs_LEE = rng.integers(0, 9, (2, 4, 4)).astype(np.float32)
  return Routing(load_LGE, pairs_LEE, rng.integers(0, 4, (2, 5, 2)).astype(np.uint16))


def test_a_record_comes_back_from_its_file_and_steps_are_listed(tmp_path):
  for step in (100, 0):
    record(step).save(tmp_path, step)
  assert saved_steps(tmp_path) == [0, 100]
  loaded = Routing.load(tmp_path, 100)
  for name, value in vars(record(100)).items():
    np.testing.assert_array_equal(getattr(loaded, name), value)


def test_metrics_are_by_layer_and_overlap_needs_a_record_before():
  now = record()
  metrics = now.metrics(None)
  load_LE = now.load_LGE.sum(1)
  np.testing.assert_allclose(
    metrics['router/max_vio_global'], load_LE.max(-1) / load_LE.mean(-1) - 1, rtol=1e-6
  )
  assert 'router/overlap' not in metrics
  assert now.metrics(now)['router/overlap'] == pytest.approx([1.0, 1.0])
