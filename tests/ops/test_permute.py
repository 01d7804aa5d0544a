"""Dispatch and combine against loops, and their gradients against autodiff of plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.permute import (
  bucket_by_destination,
  combine,
  dispatch,
  padded_rows,
  reference,
  sort_by_destination,
  triton,
)

# T tokens  D width  K choices a token  R rows  E destinations
T, D, K, E = 12, 5, 3, 6
NOWHERE = E


def choices(name: str) -> np.ndarray:
  """destination_TK, of the ugly kinds."""
  rng = np.random.default_rng(0)
  distinct = np.stack([rng.permutation(E)[:K] for _ in range(T)])
  match name:
    case 'mixed':
      return distinct
    case 'all_to_one':
      return np.full((T, 1), 4)
    case 'one_without_tokens':
      return np.where(distinct == 2, NOWHERE, distinct)
    case 'one_token':
      return distinct[:1]
    case 'nothing_stays':
      return np.full((T, K), NOWHERE)
    case 'every_destination':
      return np.tile(np.arange(E), (T, 1))
  raise ValueError(name)


CASES = pytest.mark.parametrize(
  'destination_TK',
  [
    pytest.param(choices(name), id=name)
    for name in (
      'mixed',
      'all_to_one',
      'one_without_tokens',
      'one_token',
      'nothing_stays',
      'every_destination',
    )
  ],
)


def make(destination_TK, *, spare=4):
  T, K = destination_TK.shape
  keys = jax.random.split(jax.random.key(1), 3)
  R = min(int((destination_TK < NOWHERE).sum()) + spare, T * K)
  plan = sort_by_destination(jnp.asarray(destination_TK, jnp.int32), num_destinations=E, num_rows=R)
  x_TD, y_RD = jax.random.normal(keys[0], (T, D)), jax.random.normal(keys[1], (R, D))
  return plan, x_TD, y_RD, jax.random.normal(keys[2], (T, K))


def naive_combine(y_RD, weight_TK, row_TK):
  """A row of zeros stands behind the last one, for choices that go nowhere."""
  y_RD = jnp.concatenate([y_RD, jnp.zeros((1, D))])
  return (y_RD[row_TK] * weight_TK[..., None]).sum(1)


@CASES
def test_sort_lays_choices_out_by_destination_with_tokens_in_order(destination_TK):
  plan = make(destination_TK)[0]
  expected = [
    (e, t) for e in range(E) for t, row in enumerate(destination_TK) for d in row if d == e
  ]
  np.testing.assert_array_equal(plan.token_R[: len(expected)], [t for _, t in expected])
  np.testing.assert_array_equal(plan.size_E, [(destination_TK == e).sum() for e in range(E)])


@CASES
def test_every_choice_finds_the_row_of_its_token_and_destination(destination_TK):
  plan = make(destination_TK)[0]
  R, edges = len(plan.token_R), np.cumsum(plan.size_E)
  for (t, k), row in np.ndenumerate(plan.row_TK):
    if destination_TK[t, k] == NOWHERE:
      assert row == R
    else:
      assert plan.token_R[row] == t
      assert np.searchsorted(edges, row, side='right') == destination_TK[t, k]
  used = np.asarray(plan.row_TK)[destination_TK < NOWHERE]
  assert len(set(used.tolist())) == used.size, 'two choices share a row'


@CASES
def test_bucket_fills_each_destination_from_the_front_with_tokens_in_order(destination_TK):
  visits_TE = (destination_TK[..., None] == np.arange(E)).any(1)
  T = len(visits_TE)
  plan = bucket_by_destination(jnp.asarray(visits_TE))
  for e in range(E):
    expected = np.flatnonzero(visits_TE[:, e])
    np.testing.assert_array_equal(plan.token_R[e * T :][: len(expected)], expected)
    np.testing.assert_array_equal(plan.row_TK[expected, e], e * T + np.arange(len(expected)))
    np.testing.assert_array_equal(plan.row_TK[~visits_TE[:, e], e], E * T)
  np.testing.assert_array_equal(plan.size_E, visits_TE.sum(0))


@CASES
def test_dispatch_equals_indexing_with_its_gradient(destination_TK):
  plan, x_TD, y_RD, _ = make(destination_TK)
  used_R1 = (jnp.arange(len(plan.token_R)) < plan.size_E.sum())[:, None]
  x_RD, vjp = jax.vjp(lambda x: dispatch(x, plan), x_TD)
  expected_RD, naive_vjp = jax.vjp(lambda x: jnp.where(used_R1, x[plan.token_R], 0), x_TD)
  np.testing.assert_array_equal(jnp.where(used_R1, x_RD, 0), expected_RD)
  # a sum of at most E terms in another order
  np.testing.assert_allclose(vjp(y_RD)[0], naive_vjp(y_RD)[0], atol=1e-6)


@CASES
def test_combine_equals_a_weighted_sum_with_its_gradients(destination_TK):
  plan, x_TD, y_RD, weight_TK = make(destination_TK)
  out_TD, vjp = jax.vjp(lambda y, w: combine(y, w, plan), y_RD, weight_TK)
  expected_TD, naive_vjp = jax.vjp(lambda y, w: naive_combine(y, w, plan.row_TK), y_RD, weight_TK)
  np.testing.assert_allclose(out_TD, expected_TD, atol=1e-6)
  for found, expected in zip(vjp(x_TD), naive_vjp(x_TD), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_unused_rows_hold_reaches_nothing():
  plan, x_TD, y_RD, weight_TK = make(choices('one_without_tokens'))
  poisoned_RD = jnp.where((jnp.arange(len(y_RD)) < plan.size_E.sum())[:, None], y_RD, jnp.nan)

  def run(y_RD):
    out, vjp = jax.vjp(lambda y, w: combine(y, w, plan), y_RD, weight_TK)
    back = jax.vjp(lambda x: dispatch(x, plan), x_TD)[1](y_RD)
    return [out, vjp(x_TD)[1], *back]

  for found, expected in zip(run(poisoned_RD), run(y_RD), strict=True):
    np.testing.assert_array_equal(found, expected)


def test_unused_rows_get_no_gradient():
  plan, x_TD, y_RD, weight_TK = make(choices('one_without_tokens'))
  dy_RD = jax.vjp(lambda y: combine(y, weight_TK, plan), y_RD)[1](x_TD)[0]
  np.testing.assert_array_equal(dy_RD[plan.size_E.sum() :], 0)


def test_combine_of_bfloat16_sums_in_float32():
  plan, _, y_RD, _ = make(choices('every_destination'))
  weight_TK = jnp.ones((T, E))
  y_RD = (1 + y_RD / 100).astype(jnp.bfloat16)
  out_TD = combine(y_RD, weight_TK, plan)
  assert out_TD.dtype == jnp.bfloat16
  exact = naive_combine(y_RD.astype(jnp.float32), weight_TK, plan.row_TK)
  np.testing.assert_array_equal(out_TD, exact.astype(jnp.bfloat16))


def test_permutation_under_jit_and_vmap_equals_one_by_one():
  destination = jnp.asarray(np.stack([choices('mixed'), choices('mixed')[::-1]]), jnp.int32)
  x = jax.random.normal(jax.random.key(0), (2, T, D))
  weight = jax.random.normal(jax.random.key(1), (2, T, K))

  def there_and_back(destination_TK, x_TD, weight_TK):
    plan = sort_by_destination(destination_TK, num_destinations=E, num_rows=T * K)
    return combine(dispatch(x_TD, plan), weight_TK, plan)

  together = jax.jit(jax.vmap(there_and_back))(destination, x, weight)
  for i in range(2):
    alone = there_and_back(destination[i], x[i], weight[i])
    np.testing.assert_allclose(together[i], alone, atol=1e-6)
    np.testing.assert_allclose(alone, x[i] * weight[i].sum(-1, keepdims=True), atol=1e-6)


def test_padded_destinations_start_on_multiples_and_hold_the_same_tokens():
  destination_TK = jnp.asarray(choices('mixed'), jnp.int32)
  R = padded_rows(T * K, E, 8)
  plan = sort_by_destination(destination_TK, num_destinations=E, num_rows=R, multiple=8)
  compact = sort_by_destination(destination_TK, num_destinations=E, num_rows=T * K)
  np.testing.assert_array_equal(plan.offset_E % 8, 0)
  np.testing.assert_array_equal(plan.size_E, compact.size_E)
  rows = np.concatenate([o + np.arange(s) for o, s in zip(plan.offset_E, plan.size_E, strict=True)])
  np.testing.assert_array_equal(plan.choice_R[rows], compact.choice_R)
  gaps = np.delete(np.arange(R), rows)
  np.testing.assert_array_equal(plan.token_R[gaps], T)
  x_RD = dispatch(jax.random.normal(jax.random.key(0), (T, D)), plan)
  np.testing.assert_array_equal(x_RD[gaps], 0)


@pytest.mark.parametrize(
  ('n', 'e'), [(700, 5), (600, 64), (1, 3), pytest.param(700, 300, marks=pytest.mark.slow)]
)
def test_triton_counts_ranks_as_sorting_does(n, e):
  key_N = jax.random.randint(jax.random.key(0), (n,), 0, e + 1)  # e itself goes nowhere
  (rank, size), (expected, sizes) = triton.ranks(key_N, e), reference.ranks(key_N, e)
  np.testing.assert_array_equal(size, sizes)
  np.testing.assert_array_equal(rank[key_N < e], expected[key_N < e])


@pytest.mark.parametrize(
  ('name', 'dtype'), [('mixed', jnp.float8_e4m3fn), ('one_without_tokens', jnp.bfloat16)]
)
def test_triton_spreads_tokens_as_indexing_does(name, dtype):
  destination_TK = choices(name)
  plan = make(destination_TK)[0]
  x_TD = jax.random.normal(jax.random.key(0), (len(destination_TK), 136)).astype(dtype)
  found, expected = (
    m.spread_rows(x_TD, plan, multiple=1)[: plan.size_E.sum()].astype(jnp.float32)
    for m in (triton, reference)
  )
  np.testing.assert_array_equal(found, expected)


def test_triton_writes_zeros_into_the_gaps_behind_groups():
  options = dict(num_destinations=E, num_rows=padded_rows(T * K, E, 16), multiple=16)
  plan = sort_by_destination(jnp.asarray(choices('one_without_tokens'), jnp.int32), **options)
  x_TD = jax.random.normal(jax.random.key(0), (T, 136))
  found, expected = (m.spread_rows(x_TD, plan, multiple=16) for m in (triton, reference))
  end = int((plan.offset_E + plan.size_E).max() + 15) // 16 * 16
  np.testing.assert_array_equal(found[:end], expected[:end])


def test_a_named_implementation_that_cannot_run_says_why():
  with pytest.raises(NotImplementedError, match='sort_by_destination, triton: needs an NVIDIA GPU'):
    sort_by_destination(
      jnp.zeros((2, 1), jnp.int32), num_destinations=2, num_rows=2, implementation='triton'
    )
