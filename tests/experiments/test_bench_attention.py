"""The attention suite counts and checks what it times."""

import dataclasses

import numpy as np
import pytest

from experiments.bench.suites.attention import Case, run_case

SMALL = Case('packed', 2, 300, 2, (16, 8), packed=True)


@pytest.mark.parametrize('window', [None, 40])
def test_pairs_are_those_of_the_mask(window):
  case = dataclasses.replace(SMALL, length=3000, window=window)
  ahead = np.arange(3000)[:, None] - np.arange(3000)
  near = (ahead >= 0) & (ahead < (window or 3000))
  masks = [near & (row[:, None] == row) for row in case.segments()]
  assert case.pairs() == sum(mask.sum() for mask in masks)


def test_rows_carry_errors_of_bfloat16():
  rows = run_case(SMALL)
  assert [row.work for row in rows] == ['fwd', 'bwd']
  assert all(row.error is not None and row.error < 5e-3 for row in rows)
