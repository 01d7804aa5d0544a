"""The rows of a benchmark, on screen and on disk."""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments.balance.turns import turn
from experiments.bench.timing import Timing

RESULTS = pathlib.Path(__file__).parent / 'results'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  work: str
  shape: str
  by: str
  ms: float
  spread: float | None  # None: of one call
  # TFLOP/s or GB/s, of useful operations or bytes only
  rate: float
  unit: str
  # of the chip's limit, 0 to 1
  of_limit: float
  # of the groups, where there are some
  sizes: str = ''
  error: float | None = None
  # what must move to and from device memory, counted, and the memory in use at the peak
  gigabytes: float | None = None
  peak_gib: float | None = None
  # in tokens, of the rows that show how cost grows with it
  length: int | None = None
  note: str = ''


def row_of(timing: Timing, *, amount: float, limit: float, unit: str, **names) -> Row:
  """`amount` operations or bytes; `limit` in units of 1e12 (TFLOP/s) or 1e9 (GB/s) a second."""
  rate = amount / timing.median_s / (1e12 if unit == 'TFLOP/s' else 1e9)
  return Row(
    ms=timing.median_s * 1e3,
    spread=timing.spread,
    rate=rate,
    unit=unit,
    of_limit=rate / limit,
    **names,
  )


def show(rows: list[Row], title: str) -> None:
  table = Table(title=title, caption='useful operations only; spread is (max - min) / median')
  for name in ('work', 'shape', 'group sizes', 'by'):
    table.add_column(name)
  # columns that some suites have
  extra = [n for n in ('gigabytes', 'peak_gib') if any(getattr(r, n) is not None for r in rows)]
  for name in ('ms', 'spread', 'rate', 'of limit', 'error', *extra):
    table.add_column(name, justify='right')
  for row in rows:
    table.add_row(
      row.work,
      row.shape,
      row.sizes,
      row.by + (f' ({row.note})' if row.note else ''),
      f'{row.ms:.3f}',
      '' if row.spread is None else f'{row.spread:.1%}',
      f'{row.rate:.0f} {row.unit}',
      f'{row.of_limit:.0%}',
      '' if row.error is None else f'{row.error:.1e}',
      *('' if getattr(row, n) is None else f'{getattr(row, n):.2f}' for n in extra),
    )
  # without a terminal rich assumes 80 columns and cuts the numbers
  console = Console()
  (console if console.is_terminal else Console(width=160)).print(table)


def save(
  rows: list[Row], suite: str, folder: pathlib.Path = RESULTS, *, among: bool = False
) -> pathlib.Path:
  """Writes folder/suite.json.

  Args:
    among: the file's other rows stay: those that differ in work, shape, sizes or by.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{suite}.json'
  # processes that measure a row each share the file
  with turn(folder / f'.{suite}.lock' if among else None):
    kept = [dataclasses.asdict(row) for row in rows]
    if among and path.exists():
      identity = lambda row: [row[name] for name in ('work', 'shape', 'sizes', 'by')]
      new = [identity(row) for row in kept]
      old = json.loads(path.read_text())['rows']
      kept = [row for row in old if identity(row) not in new] + kept
    path.write_text(json.dumps(_content(kept, suite), indent=1) + '\n')
  return path


def _content(rows: list[dict[str, Any]], suite: str) -> dict[str, Any]:
  return {
    'command': f'python -m experiments.bench --suite={suite}',
    'device': jax.devices()[0].device_kind,
    'date': datetime.date.today().isoformat(),
    'versions': versions(),
    'rows': rows,
  }


def versions() -> dict[str, str]:
  found = {}
  for name in ('jax', 'jaxlib', 'torch'):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
