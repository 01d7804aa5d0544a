"""The indexer's choice is exact, and its loss is a divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.attention import masked_attention, visible
from moe_jax.ops.indexer import attention_target, index_loss, index_scores, top_k_mask

NONE = -jnp.inf


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize('k', [1, 3, 6, 7, 9])
def test_top_k_mask_marks_what_top_k_returns_ties_included(k):
  score = jnp.round(draw(5, 4, 7) * 2) + 0.0  # many equal ones; lax.top_k puts -0 below 0
  allowed = draw(5, 4, 7, seed=1) > -0.5
  _, best = jax.lax.top_k(jnp.where(allowed, score, NONE), min(k, 7))
  expected = np.zeros(score.shape, bool)
  np.put_along_axis(expected, np.asarray(best), True, axis=-1)
  np.testing.assert_array_equal(top_k_mask(score, allowed, k=k), expected & allowed)


def test_top_k_mask_takes_the_earliest_of_equal_scores():
  mask = top_k_mask(jnp.zeros((1, 6)), jnp.ones((1, 6), bool).at[0, 0].set(False), k=3)
  assert mask.tolist() == [[False, True, True, True, False, False]]


def test_index_scores_sum_weighted_positive_products():
  q, k, w = draw(2, 3, 4, 8), draw(2, 5, 8, seed=1), draw(2, 3, 4, seed=2)
  expected = np.zeros((2, 3, 5))
  for b, s, t, j in np.ndindex(2, 3, 5, 4):
    expected[b, s, t] += w[b, s, j] * max(np.dot(q[b, s, j], k[b, t]), 0) / np.sqrt(8)
  np.testing.assert_allclose(index_scores(q, k, w), expected, atol=1e-5)


def test_index_loss_is_zero_where_scores_are_the_logarithm_of_the_target():
  segment = jnp.ones((1, 6), jnp.int32)
  mask = visible(segment, segment, jnp.zeros(1, jnp.int32))
  target = attention_target(draw(1, 6, 2, 4), draw(1, 6, 2, 4, seed=1), mask, scale=0.5)
  np.testing.assert_allclose(target.sum(-1), 1, atol=1e-6)
  loss = lambda score: index_loss(target, score, mask, segment > 0)
  right = jnp.log(jnp.maximum(target, 1e-30)) + 3
  assert abs(loss(right)) < 1e-6
  assert loss(draw(1, 6, 6, seed=2)) > 0.01
  assert np.abs(jax.grad(loss)(right)).max() < 1e-6


def test_index_loss_leaves_padding_out():
  mask = jnp.tri(4, dtype=bool)[None]
  target, score = mask / mask.sum(-1, keepdims=True), draw(1, 4, 4)
  valid = jnp.array([[True, True, False, False]])
  loss = index_loss(target, score, mask, valid)
  alone = index_loss(target[:, :2, :2], score[:, :2, :2], mask[:, :2, :2], valid[:, :2])
  np.testing.assert_allclose(loss, alone, rtol=1e-6)
  assert index_loss(target, score, mask, valid & False) == 0


def test_masked_attention_reads_only_marked_keys():
  q, k, v = (draw(1, 5, 2, 4, seed=i) for i in range(3))
  mask = jnp.tri(5, dtype=bool)[None].at[:, 4, 1].set(False)
  out = masked_attention(q, k, v, mask, scale=0.5)
  poisoned = masked_attention(q, k.at[:, 1].set(1e6), v.at[:, 1].set(1e6), mask, scale=0.5)
  np.testing.assert_array_equal(out[:, 4], poisoned[:, 4])
