"""The helpers yield the rows they say, in the order they say."""

import builtins

import pytest

from sweeps import space


def test_grid_gives_every_combination_and_the_last_field_is_fastest():
  rows = list(space.grid({'a': [1, 2], 'b': 'xy'}))
  assert [(r['a'], r['b']) for r in rows] == [(1, 'x'), (1, 'y'), (2, 'x'), (2, 'y')]


def test_grid_of_rows_and_fields_is_every_pair():
  rows = list(space.grid(space.zip({'a': [1, 2], 'b': [3, 4]}), {'seed': range(2)}))
  assert [(r['a'], r['b'], r['seed']) for r in rows] == [(1, 3, 0), (1, 3, 1), (2, 4, 0), (2, 4, 1)]


def test_grid_refuses_a_field_that_two_parts_give():
  with pytest.raises(ValueError, match='two parts give a'):
    list(space.grid({'a': [1]}, {'a': [2]}))


def test_zip_goes_through_its_fields_together_and_refuses_unequal_ones():
  assert list(space.zip({'a': [1, 2], 'b': [3, 4]})) == [{'a': 1, 'b': 3}, {'a': 2, 'b': 4}]
  with pytest.raises(ValueError, match='equally many'):
    list(space.zip({'a': [1, 2], 'b': [3]}))


def test_random_is_the_same_for_a_seed_and_stays_within_its_range():
  fields = {'lr': space.log_uniform(1e-4, 1e-2), 'x': space.uniform(0, 1), 'k': [1, 2]}
  rows = list(space.random(fields, num=200, seed=3))
  assert rows == list(space.random(fields, num=200, seed=3))
  assert rows != list(space.random(fields, num=200, seed=4))
  rates = [r['lr'] for r in rows]
  assert min(rates) >= 1e-4 and max(rates) <= 1e-2
  assert 0.4 < sum(rate < 1e-3 for rate in rates) / 200 < 0.6, 'each factor of ten alike'


def test_chain_keeps_the_order():
  assert list(space.chain([{'a': 1}], iter([{'a': 2}]))) == [{'a': 1}, {'a': 2}]


def test_helpers_leave_python_alone():
  assert space.zip is not builtins.zip
  assert zip is builtins.zip
