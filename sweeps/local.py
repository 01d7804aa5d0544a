"""Runs rows as processes of this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from sweeps.record import LOG, Record, in_use
from sweeps.rows import Row

GRACE_S = 120.0  # between asking a run to stop and killing it: it may be compiling, then saves
LEASH = str(Path(__file__).with_name('leash.py'))


class Launcher(Protocol):
  """Where rows run. A record's state is RUNNING from `start` until `poll` returns the row."""

  farewell: str  # said when asked to stop

  def room(self) -> int:
    """How many more rows may be started now."""
    ...

  def start(self, rows: Sequence[tuple[Row, Record]]) -> None: ...

  def poll(self) -> list[Row]:
    """Settles the records of rows whose processes have ended, and returns these rows."""
    ...

  def stop(self, row: Row) -> None:
    """Asks a row to save and stop; `poll` returns it when it has."""
    ...

  def stop_all(self) -> None: ...

  def kill_all(self) -> None: ...


class _Job:
  """A row that was handed over; it has no process while an earlier launcher's still works on it."""

  def __init__(self, row: Row, record: Record, device: str | None):
    self.row, self.record, self.device = row, record, device
    self.process: subprocess.Popen | None = None
    self.started_s = time.monotonic()
    self.log_start = 0
    self.kill_at_s: float | None = None


class LocalLauncher:
  """At most `jobs` processes of experiments.run at a time.

  Args:
    devices: a value of CUDA_VISIBLE_DEVICES for each job; empty leaves the environment alone.
    env: of the processes.
  """

  def __init__(self, jobs: int, *, devices: Sequence[str] = (), env: Mapping[str, str]):
    self._jobs, self._env = jobs, env
    self._free = list(devices)
    self._running: list[_Job] = []

  farewell = 'stopping: rows save first; ask once more to kill them'

  def room(self) -> int:
    return self._jobs - len(self._running)

  def start(self, rows: Sequence[tuple[Row, Record]]) -> None:
    for row, record in rows:
      job = _Job(row, record, self._free.pop(0) if self._free else None)
      self._running.append(job)
      if not in_use(row.workdir):
        self._begin(job)

  def poll(self) -> list[Row]:
    ended = []
    for job in list(self._running):
      if job.process is None:
        if job.kill_at_s is not None:
          job.record.settle(job.row, 0)
        elif in_use(job.row.workdir):
          continue
        else:
          self._begin(job)
          continue
      else:
        code = job.process.poll()
        if code is None:
          if job.kill_at_s is not None and time.monotonic() > job.kill_at_s:
            _signal(job, signal.SIGKILL)
          continue
        job.record.seconds += time.monotonic() - job.started_s
        asked = job.kill_at_s is not None and code < 0  # too early in its life to save anything
        job.record.settle(job.row, 0 if asked else code, log_start=job.log_start)
      job.record.write(job.row)
      self._running.remove(job)
      if job.device is not None:
        self._free.append(job.device)
      ended.append(job.row)
    return ended

  def stop(self, row: Row) -> None:
    for job in self._running:
      if job.row is row and job.kill_at_s is None:
        job.kill_at_s = time.monotonic() + GRACE_S
        _signal(job, signal.SIGTERM)

  def stop_all(self) -> None:
    for job in self._running:
      self.stop(job.row)

  def kill_all(self) -> None:
    for job in self._running:
      _signal(job, signal.SIGKILL)

  def _begin(self, job: _Job) -> None:
    job.record.starts += 1
    job.record.write(job.row)
    env = dict(self._env)
    if job.device is not None:
      env['CUDA_VISIBLE_DEVICES'] = job.device
    job.started_s = time.monotonic()
    with (job.row.folder / LOG).open('ab') as log:
      job.log_start = log.tell()
      job.process = subprocess.Popen(
        [sys.executable, '-S', LEASH, str(os.getpid()), *job.row.command],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
      )


def _signal(job: _Job, number: int) -> None:
  if job.process is not None and job.process.poll() is None:
    os.killpg(job.process.pid, number)
