"""What is known about a row on disk: row.json beside its run's own files, and the run's metrics.

A finished run speaks for itself by its summary.json. What it cannot say of itself stands in
row.json: that it failed and why, that it was pruned, how often it was started, its Slurm job.
"""

import dataclasses
import enum
import fcntl
import json
import math
from pathlib import Path
from typing import Any

from moe_jax.train.workdir import Workdir, atomic_write_text
from sweeps.rows import Row, command_line

LOG = 'log.txt'  # what a row's processes print
TAIL_LINES = 12  # of the log, kept as the error of a row that gave no reason of its own
REASONS = ('error: ', 'given up: ')  # how experiments.run begins the line that says why


class State(enum.StrEnum):
  WAITING = 'waiting'
  RUNNING = 'running'
  DONE = 'done'
  FAILED = 'failed'
  PRUNED = 'pruned'
  STOPPED = 'stopped'  # half-done: the same command goes on with it

  @property
  def final(self) -> bool:
    """Nothing more will be done for the row, unless asked to try again."""
    return self in (State.DONE, State.FAILED, State.PRUNED)


@dataclasses.dataclass
class Record:
  state: State = State.WAITING
  error: str = ''
  starts: int = 0  # processes that have worked on the row
  seconds: float = 0.0  # of all of them, starting up included
  job: str = ''  # Slurm's id

  @classmethod
  def read(cls, row: Row) -> 'Record':
    path = row.folder / 'row.json'
    old = json.loads(path.read_text()) if path.is_file() else {}
    known = {f.name: old[f.name] for f in dataclasses.fields(cls) if f.name in old}
    record = cls(**known)
    record.state = State(record.state)
    if row.summary():
      record.state, record.error = State.DONE, ''
    elif record.state in (State.DONE, State.RUNNING):
      record.state = State.STOPPED  # the sweep now asks for more steps, or its launcher has died
    return record

  def wants_work(self, *, retry: bool) -> bool:
    return not self.state.final or (retry and self.state is State.FAILED)

  def write(self, row: Row) -> None:
    row.folder.mkdir(parents=True, exist_ok=True)
    about = {
      'number': row.number,
      'overrides': row.overrides,
      'command': command_line(row),
    }
    text = json.dumps(about | dataclasses.asdict(self), indent=2)
    atomic_write_text(row.folder / 'row.json', text + '\n')

  def settle(self, row: Row, code: int | None, *, log_start: int = 0) -> None:
    """Takes down how a process of the row ended.

    Args:
      code: its exit status, negative for a signal; None where it vanished.
      log_start: bytes of the log that were there before it.
    """
    if code == 0:
      self.state, self.error = (State.DONE if row.summary() else State.STOPPED), ''
      return
    self.state = State.FAILED
    self.error = _reason(row.folder / LOG, log_start)
    if code is None:
      self.error = f'ended without a word. {self.error}'
    elif code < 0:
      self.error = f'killed by signal {-code}. {self.error}'
    self.error = self.error.strip() or f'exit code {code}'


def _reason(log: Path, start: int) -> str:
  text = ''
  if log.is_file():
    with log.open('rb') as file:
      file.seek(start)
      text = file.read().decode(errors='replace')
  lines = [line.rstrip() for line in text.splitlines() if line.strip()]
  for line in reversed(lines):
    for mark in REASONS:
      if line.startswith(mark):
        return line.removeprefix('error: ')
  return '\n'.join(lines[-TAIL_LINES:])


def in_use(workdir: Workdir) -> bool:
  """Whether a run holds the workdir: one of an earlier launcher, which will end by itself."""
  path = workdir.path / '.lock'
  if not path.exists():
    return False
  with path.open('a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False


class Follower:
  """Reads a run's metrics.jsonl as it grows."""

  def __init__(self, workdir: Workdir):
    self._path = workdir.metrics
    self._inode, self._offset = 0, 0
    self.step = 0
    self.loss = math.nan  # of the last step
    self.max_vio = math.nan  # of the worst layer, at the last step
    self.evaluations: dict[int, float] = {}  # {step: validation loss}

  def update(self) -> None:
    """Takes in the lines that are complete by now."""
    try:
      with self._path.open('rb') as file:
        stat = self._path.stat()
        if stat.st_ino != self._inode or stat.st_size < self._offset:
          # a resumed run has cut off what came after its checkpoint
          self._inode, self._offset, self.step = stat.st_ino, 0, 0
          self.evaluations.clear()
        file.seek(self._offset)
        whole = file.read()
    except FileNotFoundError:
      return
    whole = whole[: whole.rfind(b'\n') + 1]
    self._offset += len(whole)
    for line in whole.splitlines():
      try:
        self._take(json.loads(line))
      except ValueError:  # torn by a kill
        continue

  def _take(self, row: dict[str, Any]) -> None:
    if 'eval/loss' in row:
      self.evaluations[row['step']] = float(row['eval/loss'])
    if 'train/loss' in row:
      self.step, self.loss = row['step'], float(row['train/loss'])
      self.max_vio = max(map(float, row.get('router/max_vio') or [math.nan]))
