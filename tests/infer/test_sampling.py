"""Temperature and nucleus, by the frequencies that they lead to."""

# B rows  V vocabulary

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.infer.sampling import sample

PROBABILITY = np.array([0.5, 0.25, 0.15, 0.1])
ORDER = np.array([2, 0, 3, 1])  # so that the likeliest is not the first
LOGITS = jnp.asarray(np.log(PROBABILITY[ORDER]), jnp.float32)
N = 4000
# four standard deviations of a share of N draws
ATOL = 4 * 0.5 / np.sqrt(N)


def shares(*, temperature=1.0, top_p=1.0, logits=LOGITS):
  """How often each token is drawn, in the order of PROBABILITY."""
  draw = jax.jit(lambda a, key: sample(a, key, temperature=temperature, top_p=top_p))
  token_B = draw(jnp.tile(logits, (N, 1)), jax.random.key(0))
  counts = np.bincount(token_B, minlength=len(logits))
  return counts[np.argsort(ORDER)] / N


def test_draws_follow_the_softmax():
  np.testing.assert_allclose(shares(), PROBABILITY, atol=ATOL)


@pytest.mark.parametrize('temperature', [0.5, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature):
  expected = PROBABILITY ** (1 / temperature)
  np.testing.assert_allclose(shares(temperature=temperature), expected / expected.sum(), atol=ATOL)


@pytest.mark.parametrize(
  ('top_p', 'kept'), [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (0.95, 4), (1.0, 4)]
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, kept):
  expected = np.where(np.arange(4) < kept, PROBABILITY, 0)
  found = shares(top_p=top_p)
  np.testing.assert_allclose(found, expected / expected.sum(), atol=ATOL)
  assert (found[kept:] == 0).all()


def test_nucleus_is_taken_after_the_temperature():
  # at temperature 0.5 the likeliest has 0.25 / 0.345 = 0.72
  found = shares(temperature=0.5, top_p=0.7)
  np.testing.assert_array_equal(found, [1, 0, 0, 0])


def test_temperature_zero_takes_the_largest_whatever_the_key():
  logits = jnp.tile(LOGITS, (100, 1))
  for seed in range(3):
    token_B = sample(logits, jax.random.key(seed), temperature=0.0, top_p=0.1)
    np.testing.assert_array_equal(token_B, 1)


def test_impossible_tokens_are_never_drawn():
  found = shares(logits=LOGITS.at[1].set(-jnp.inf))
  assert found[0] == 0
  np.testing.assert_allclose(found[1:], PROBABILITY[1:] / 0.5, atol=ATOL)


def test_rows_are_drawn_by_themselves():
  rows = jnp.where(jnp.eye(4, dtype=bool), 0.0, -jnp.inf)
  token_B = sample(rows, jax.random.key(0), temperature=1.0, top_p=0.9)
  np.testing.assert_array_equal(token_B, np.arange(4))
