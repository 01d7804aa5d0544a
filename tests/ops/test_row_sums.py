"""Sums of scattered rows: as XLA and as a kernel, by key, with rows of nobody."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import row_sums

# N rows  S keys  X width


@pytest.mark.parametrize('width', [96, 64], ids=['two pieces', 'one piece'])
def test_rows_are_summed_by_key_and_those_of_nobody_are_not_read(width):
  rng = np.random.default_rng(0)
  rows_NX = rng.standard_normal((50, width)).astype(np.float32)
  key_N = rng.integers(0, 10, 50)
  total_SX = rng.standard_normal((9, width)).astype(np.float32)
  exact = total_SX.astype(np.float64)
  np.add.at(exact, key_N[key_N < 9], rows_NX[key_N < 9])
  rows_NX[key_N == 9] = np.nan
  order, start = row_sums.inverse(jnp.asarray(key_N), 9)
  args = jnp.asarray(total_SX), jnp.asarray(rows_NX), order, start
  np.testing.assert_allclose(row_sums.add_rows(*args), exact, atol=1e-5)
  np.testing.assert_allclose(row_sums.triton_add_rows(*args), exact, atol=1e-5)
