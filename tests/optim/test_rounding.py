"""Rounding by chance: to a neighbour, right on average, the same again for the same seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.optim.rounding import hashed_bits, stochastic_bfloat16

N = 1 << 16


@pytest.mark.parametrize('value', [1.001, -3.14159, 1e-20, 65000.0])
def test_the_mean_of_many_roundings_is_the_value(value):
  x = jnp.full((N,), value, jnp.float32)
  rounded = np.asarray(stochastic_bfloat16(x, hashed_bits(x, jnp.uint32(7))), np.float64)
  low, high = np.unique(rounded)
  assert low < value < high
  # standard error of a mean of N draws from two neighbours, five of them
  assert abs(rounded.mean() - np.float64(np.float32(value))) < 5 * (high - low) / 2 / N**0.5


@pytest.mark.parametrize('value', [0.0, 1.0, -0.5, np.inf, -np.inf, np.nan])
def test_what_bfloat16_holds_stays(value):
  x = jnp.full((256,), value, jnp.float32)
  rounded = stochastic_bfloat16(x, jnp.full((256,), 0xFFFF, jnp.uint32))
  np.testing.assert_array_equal(rounded.astype(jnp.float32), x)


def test_bits_are_uniform_in_both_halves_and_change_with_the_seed():
  x = jnp.zeros((N,))
  one, other = (np.asarray(hashed_bits(x, jnp.uint32(seed))) for seed in (1, 2))
  for bits in (one & 0xFFFF, one >> 16, (one ^ other) & 0xFFFF, (one ^ other) >> 16):
    counts = np.bincount(bits >> 8, minlength=256)
    # chi squared of 255 degrees of freedom: mean 255, deviation 23
    assert ((counts - N / 256) ** 2 / (N / 256)).sum() < 400


def test_bits_do_not_depend_on_the_mesh():
  expected = hashed_bits(jnp.zeros((8, 6)), jnp.uint32(5))
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    split = jax.sharding.reshard(jnp.zeros((8, 6)), jax.P(sh.DATA, sh.MODEL))
    np.testing.assert_array_equal(jax.jit(hashed_bits)(split, jnp.uint32(5)), expected)
