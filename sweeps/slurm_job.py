"""What a Slurm job does: one row's process. Pickled by submitit, so it imports nothing heavy."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

WAIT_S = 5.0


class RowJob:
  """Runs `command`, whose output goes to the row's log; called on the node.

  Before a timeout or a preemption submitit calls `checkpoint`: the run saves, and Slurm queues the
  job again.

  Args:
    env: what is added to the job's environment.
  """

  def __init__(self, command: Sequence[str], folder: str, env: Mapping[str, str]):
    self._command, self._folder, self._env = list(command), Path(folder), dict(env)
    self._process: subprocess.Popen | None = None

  def __call__(self) -> tuple[int, int]:
    """Returns the exit code and the bytes that the log had before."""
    self._wait_for_others()
    with (self._folder / 'log.txt').open('ab') as log:
      start = log.tell()
      self._process = subprocess.Popen(
        self._command,
        env=os.environ | self._env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
      )
    return self._process.wait(), start

  def checkpoint(self):
    from submitit.helpers import DelayedSubmission

    if self._process is not None:
      self._process.send_signal(signal.SIGTERM)
      self._process.wait()
    return DelayedSubmission(RowJob(self._command, str(self._folder), self._env))

  def _wait_for_others(self) -> None:
    """A launcher that was killed before it could note its jobs has left one at work on the row."""
    lock = self._folder / '.lock'
    while lock.exists():
      with lock.open('a') as file:
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
          return
        except BlockingIOError:
          time.sleep(WAIT_S)
