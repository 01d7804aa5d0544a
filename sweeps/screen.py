"""What a sweep shows: a live table on a terminal, a plain line for each change anywhere else."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moe_jax.analysis.human import duration
from sweeps.record import Follower, Record, State
from sweeps.rows import Row, describe

COLOURS = {
  State.RUNNING: 'cyan',
  State.DONE: 'green',
  State.FAILED: 'red',
  State.PRUNED: 'yellow',
  State.STOPPED: 'yellow',
  State.WAITING: 'dim',
}
# a table longer than the screen drops rows from the end of this list first
ORDER = (State.RUNNING, State.FAILED, State.STOPPED, State.DONE, State.PRUNED, State.WAITING)
REFRESH_S = 0.5


class Screen:
  """Shows rows while they run; `update` is called often and draws seldom.

  Args:
    interval_s: seconds between two lines about the same running row, without a terminal.
    clock: seconds; replaced by tests.
  """

  def __init__(
    self,
    console: Console,
    *,
    interval_s: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._console, self._interval_s, self._clock = console, interval_s, clock
    self._started_s = clock()
    self._drawn_s = -math.inf
    self._names: dict[Row, str] = {}
    self._told: dict[Row, tuple[State, float]] = {}  # what was last said of a row, and when
    # no thread: the launcher forks
    self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

  def __enter__(self) -> Self:
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._live:
      self._live.stop()

  def note(self, text: str) -> None:
    self._console.print(Text(text), soft_wrap=True)
    self._console.file.flush()

  def update(
    self, rows: Sequence[Row], records: Mapping[Row, Record], progress: Mapping[Row, Follower]
  ) -> None:
    now = self._clock()
    if len(rows) != len(self._names):
      self._names = short_labels(rows)
    if not self._live:
      for row in rows:
        self._tell(row, len(rows), records[row], progress[row], now)
    elif now - self._drawn_s >= REFRESH_S:
      self._drawn_s = now
      self._live.update(self._picture(rows, records, progress), refresh=True)

  def finish(
    self, rows: Sequence[Row], records: Mapping[Row, Record], progress: Mapping[Row, Follower]
  ) -> None:
    """The last picture, and the errors in full."""
    self._drawn_s = -math.inf
    self.update(rows, records, progress)
    for row in rows:
      if records[row].state is State.FAILED and self._live:
        self.note(_failure(row, records[row]))

  def _picture(self, rows, records, progress) -> Group:
    table = Table(box=None, pad_edge=False, header_style='cyan')
    table.add_column('row', justify='right')
    table.add_column('overrides', overflow='ellipsis', no_wrap=True, ratio=1)
    for name in ('state', 'step', 'loss', 'MaxVio'):
      table.add_column(name, justify='left' if name == 'state' else 'right', no_wrap=True)
    shown = self._shown(rows, records)
    for row in shown:
      record, seen = records[row], progress[row]
      table.add_row(
        str(row.number),
        self._names[row],
        Text(record.state, style=COLOURS[record.state]),
        f'{seen.step:,}/{row.cfg.steps:,}',
        _number(seen.loss, 4),
        _number(seen.max_vio, 2),
      )
    states = [records[row].state for row in rows]
    parts = [f'{states.count(s)} {s}' for s in State if states.count(s)]
    if len(shown) < len(rows):
      parts.append(f'{len(rows) - len(shown)} not shown')
    spent = duration(self._clock() - self._started_s)
    return Group(table, Text(f'{", ".join(parts)}   {spent}', style='bold'))

  def _shown(self, rows: Sequence[Row], records: Mapping[Row, Record]) -> list[Row]:
    room = max(3, self._console.height - 4)
    by_interest = sorted(rows, key=lambda row: ORDER.index(records[row].state))
    return sorted(by_interest[:room], key=lambda row: row.number)

  def _tell(self, row: Row, num_rows: int, record: Record, seen: Follower, now: float) -> None:
    told, at_s = self._told.get(row, (State.WAITING, now))
    if record.state is told and (told is not State.RUNNING or now - at_s < self._interval_s):
      return
    first = row not in self._told and record.state.final
    self._told[row] = (record.state, now)
    if record.state is State.FAILED:
      self.note(_failure(row, record))
      return
    text = f'row {row.number}/{num_rows} {"was" if first else ""} {record.state}'
    text = ' '.join(text.split()) + f'  {self._names[row]}'
    if seen.step:
      text += f'  step {seen.step}/{row.cfg.steps}  loss {_number(seen.loss, 4)}'
    self.note(text)


def short_labels(rows: Sequence[Row]) -> dict[Row, str]:
  """Rows by the fields in which they differ, without the fields' groups, cut at 60 letters."""
  values: dict[str, set[str]] = {}
  for row in rows:
    for name, value in row.overrides.items():
      values.setdefault(name, set()).add(str(value))
  # a field that only some rows override tells them apart too
  everywhere = {n for n in values if all(n in row.overrides for row in rows)}
  constant = {n for n in everywhere if len(values[n]) == 1} if len(rows) > 1 else set()
  labels = {}
  for row in rows:
    shown = {n.rpartition('.')[2]: v for n, v in row.overrides.items() if n not in constant}
    text = describe(shown)
    labels[row] = text if len(text) <= 60 else f'{text[:57]}...'
  return labels


def _failure(row: Row, record: Record) -> str:
  return f'row {row.number} failed  {row.label}: {record.error}  (log: {row.folder}/log.txt)'


def _number(value: float, digits: int) -> str:
  return '' if math.isnan(value) else f'{value:.{digits}f}'
