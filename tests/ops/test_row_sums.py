"""Sums of scattered rows: as XLA and as a kernel, by key, with rows of nobody."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import row_sums

# N rows  S keys  X width  U queries


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


def test_rows_of_runs_are_summed_by_key():
  rng = np.random.default_rng(0)
  first_U, count_U = np.array([0, 0, 1, 4, 4, 4]), np.array([1, 3, 2, 0, 2, 3])
  rows_BUJX = rng.standard_normal((2, 6, 5, 32)).astype(np.float32)
  total_PSX = rng.standard_normal((3, 8, 32)).astype(np.float32)
  exact = total_PSX.astype(np.float64).sum(0)
  for u, j in np.ndindex(6, 3):
    if j < count_U[u]:
      exact[first_U[u] + j] += rows_BUJX[:, u, 2 + j].sum(0)
      continue
    rows_BUJX[:, u, 2 + j] = np.nan
  find = lambda a: np.searchsorted(a, np.arange(8), side='right').astype(np.int32)
  args = total_PSX, rows_BUJX, first_U.astype(np.int32), find(first_U + count_U), find(first_U)
  for add in (row_sums.add_runs, row_sums.triton_add_runs):
    got = add(*map(jnp.asarray, args), base=2)
    np.testing.assert_allclose(got.sum(0), exact, atol=1e-5)
