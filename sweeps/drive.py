"""The loop of a sweep: starts rows where there is room, watches them, stops when asked."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from sweeps.local import Launcher
from sweeps.record import Follower, Record, State
from sweeps.rows import Row
from sweeps.screen import Screen
from sweeps.tables import write_tables

POLL_S = 0.2
TABLES_S = 20.0  # between two writings of the tables while rows run


class Source(Protocol):
  """Where rows come from: a list, or a search that learns from those before."""

  rows: list[Row]  # known so far
  records: dict[Row, Record]

  def take(self, room: int) -> list[Row]:
    """At most `room` rows to start now; none where there are no more."""
    ...

  def watch(self, row: Row, seen: Follower) -> bool:
    """Looks at a running row; true to stop it."""
    ...

  def ended(self, row: Row, seen: Follower) -> None:
    """Looks at the record of a row that has just been settled, and may change it."""
    ...


class ListSource:
  """The rows of `sweep()`, in order.

  Args:
    retry: start failed rows again.
  """

  def __init__(self, rows: Sequence[Row], *, retry: bool):
    self.rows = list(rows)
    self.records = {row: Record.read(row) for row in rows}
    for row, record in self.records.items():
      if record.state.final:
        record.write(row)  # it may have ended after its launcher
    self._left = [row for row in rows if self.records[row].wants_work(retry=retry)]

  def take(self, room: int) -> list[Row]:
    taken, self._left = self._left[:room], self._left[room:]
    return taken

  def watch(self, row: Row, seen: Follower) -> bool:
    return False

  def ended(self, row: Row, seen: Follower) -> None: ...


class Stop:
  """While entered, SIGINT and SIGTERM are counted instead of obeyed."""

  def __init__(self):
    self.number, self.times = 0, 0

  def __enter__(self) -> 'Stop':
    self._old = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self.number, self.times = number, self.times + 1


class Drive:
  """Runs what `source` gives with `launcher` until nothing is left or someone asks to stop."""

  def __init__(self, source: Source, launcher: Launcher, screen: Screen, folder: Path):
    self._source, self._launcher, self._screen = source, launcher, screen
    self._folder = folder
    self._running: list[Row] = []
    self._progress: dict[Row, Follower] = {}
    self._wrote_s = time.monotonic()

  def run(self) -> int:
    """Returns the program's exit code."""
    with Stop() as stop:
      with self._screen:
        self._loop(stop)
        self._screen.finish(self._source.rows, self._source.records, self._progress)
      self._write()
    return self._tell(stop)

  def _loop(self, stop: Stop) -> None:
    heard = 0
    while True:
      if not stop.times:
        self._start()
      busy = bool(self._running)
      self._look()
      if not busy:
        return
      self._show()
      if stop.times > heard:
        self._pass_on(first=not heard)
        heard = stop.times
      if time.monotonic() - self._wrote_s > TABLES_S:
        self._write()
      time.sleep(POLL_S)

  def _start(self) -> None:
    rows, records = self._source.take(self._launcher.room()), self._source.records
    for row in rows:
      records[row].state, records[row].error = State.RUNNING, ''
    self._launcher.start([(row, records[row]) for row in rows])
    self._running += rows

  def _look(self) -> None:
    for row in self._source.rows:
      if row not in self._progress:
        self._progress[row] = Follower(row.workdir)
        self._progress[row].update()
    ended = self._launcher.poll()
    for row in self._running:
      self._progress[row].update()
      if row not in ended and self._source.watch(row, self._progress[row]):
        self._launcher.stop(row)
    for row in ended:
      self._running.remove(row)
      self._source.ended(row, self._progress[row])
      self._source.records[row].write(row)

  def _show(self) -> None:
    self._screen.update(self._source.rows, self._source.records, self._progress)

  def _pass_on(self, *, first: bool) -> None:
    if first:
      self._screen.note(self._launcher.farewell)
      self._launcher.stop_all()
    else:
      self._launcher.kill_all()

  def _write(self) -> None:
    write_tables(self._folder, self._source.rows, self._source.records)
    self._wrote_s = time.monotonic()

  def _tell(self, stop: Stop) -> int:
    states = [self._source.records[row].state for row in self._source.rows]
    counts = ', '.join(f'{states.count(s)} {s}' for s in State if states.count(s))
    self._screen.note(f'{counts}; tables: {self._folder}/results.csv, steps.csv (and .parquet)')
    if stop.times and not all(state.final for state in states):
      self._screen.note('the same command resumes')
      return 128 + stop.number
    if State.FAILED in states:
      self._screen.note('failed rows are left alone; --retry runs them again')
    return 0 if all(state in (State.DONE, State.PRUNED) for state in states) else 1
