"""Rows of a sweep, as dicts of overrides: {'optim.lr_peak': 1e-3, 'seed': 0}.

  space.grid({'balance': ['none', 'loss_free'], 'seed': range(3)})              # 6 rows
  space.zip({'model.d_model': [64, 128], 'optim.lr_peak': [2e-3, 1e-3]})        # 2 rows
  space.random({'optim.lr_peak': space.log_uniform(1e-4, 1e-2)}, num=8)         # 8 rows
  space.chain(rows, more_rows)                                                  # one after another
  space.grid(space.zip(...), {'seed': range(3)})                                # every pair of rows

Meant to be used by these names, `space.zip` and not `zip`.
"""

import builtins
import itertools
import math
import random as _random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

Overrides = dict[str, Any]
# fields with the values that each may take, or rows
Part = Mapping[str, Iterable[Any]] | Iterable[Overrides]


def grid(*parts: Part) -> Iterator[Overrides]:
  """Every combination of the parts' rows; the last part varies fastest."""
  for rows in itertools.product(*(_rows(part) for part in parts)):
    yield _merge(rows)


def zip(fields: Mapping[str, Iterable[Any]]) -> Iterator[Overrides]:
  """Row i takes value i of every field; the fields have equally many values."""
  values = {name: list(column) for name, column in fields.items()}
  lengths = {name: len(column) for name, column in values.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f'zip needs equally many values of every field, and was given {lengths}.')
  for row in builtins.zip(*values.values(), strict=True):
    yield dict(builtins.zip(values, row, strict=True))


def random(
  fields: Mapping[str, Sequence[Any] | Callable[[_random.Random], Any]], *, num: int, seed: int = 0
) -> Iterator[Overrides]:
  """`num` rows drawn independently, the same for the same seed.

  Args:
    fields: values to choose from, or a function of a random.Random such as `uniform(0, 1)`.
  """
  draw = _random.Random(seed)
  for _ in range(num):
    yield {n: f(draw) if callable(f) else draw.choice(list(f)) for n, f in fields.items()}


def chain(*parts: Iterable[Overrides]) -> Iterator[Overrides]:
  """One set of rows after another."""
  return itertools.chain(*parts)


def uniform(low: float, high: float) -> Callable[[_random.Random], float]:
  return lambda draw: _three_digits(draw.uniform(low, high))


def log_uniform(low: float, high: float) -> Callable[[_random.Random], float]:
  """Every factor of ten is equally likely."""
  return lambda draw: _three_digits(math.exp(draw.uniform(math.log(low), math.log(high))))


def _three_digits(value: float) -> float:
  """Of a random value more digits say nothing, and make a row's name hard to read."""
  return float(f'{value:.3g}')


def _rows(part: Part) -> list[Overrides]:
  if not isinstance(part, Mapping):
    return [dict(row) for row in part]
  fields = cast(Mapping[str, Iterable[Any]], part)
  columns = [[(name, value) for value in values] for name, values in fields.items()]
  return [dict(row) for row in itertools.product(*columns)]


def _merge(rows: Iterable[Overrides]) -> Overrides:
  merged: Overrides = {}
  for row in rows:
    if twice := merged.keys() & row.keys():
      raise ValueError(f'grid: two parts give {", ".join(sorted(twice))}. Give a field once.')
    merged |= row
  return merged
