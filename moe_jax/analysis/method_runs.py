"""Runs of several methods with several seeds, as comparisons leave and report them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

Record = dict[str, np.ndarray]
Records = dict[str, dict[int, Record]]  # by method, by seed


def read(folder: Path, prefix: str = '') -> Records:
  """Every run that is there as PREFIX + METHOD-SEED.npz."""
  found: Records = {}
  for path in sorted(folder.glob(f'{prefix}*.npz')):
    method, seed = path.stem.removeprefix(prefix).rsplit('-', 1)
    with np.load(path) as file:
      found.setdefault(method, {})[int(seed)] = dict(file)
  return found


def rounded(
  records: Records, numbers: Callable[[Record], dict[str, float]]
) -> dict[str, dict[int, dict[str, float]]]:
  """The numbers of every run, as a results file keeps them."""
  return {
    method: {
      seed: {name: round(float(v), 5) for name, v in numbers(record).items()}
      for seed, record in by_seed.items()
    }
    for method, by_seed in records.items()
  }


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table."""
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (head, ('---',) * len(head), *rows))
