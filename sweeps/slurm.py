"""Runs rows as jobs of a Slurm array, through submitit. The folder must be on a shared disk.

Jobs outlive the launcher: started again, it finds them by the ids in row.json.
"""

import contextlib
import io
import pickle
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.record import Record, State
from sweeps.rows import Row, SweepError
from sweeps.slurm_job import RowJob
from sweeps.tables import need

ASK_S = 3.0  # between two looks at the queue
MISSED = 3  # looks that must miss a job before it is given up: its files may come late
UNLIMITED = 1_000_000
# what jobs do not have from sbatch, which hands on the launcher's own environment
PASSED_ON = ('JAX_COMPILATION_CACHE_DIR',)


class SlurmLauncher:
  """A launcher (see sweeps.local) whose rows wait in Slurm's queue.

  Args:
    folder: of submitit's files and the jobs' own output.
    jobs: tasks of an array that run at the same time.
    parameters: 'partition=gpu,time=600', as submitit.SlurmExecutor takes them; time in minutes.
    env: of the rows.

  Raises:
    SweepError: no Slurm here, or it has no such parameter.
  """

  farewell = 'leaving: jobs stay in the queue, and the same command finds them; scancel ends them'

  def __init__(self, folder: Path, jobs: int, parameters: str, *, env: Mapping[str, str]):
    self._submitit = need('submitit')
    if not shutil.which('sbatch'):
      raise SweepError('--launcher=slurm: there is no sbatch here. Use a login node of a cluster.')
    self._folder = folder
    self._executor = self._submitit.SlurmExecutor(folder)
    values = {'array_parallelism': jobs, 'job_name': 'sweep', **_parse(parameters)}
    try:
      self._executor.update_parameters(**values)
    except (NameError, TypeError, ValueError) as e:
      raise SweepError(f'--slurm={parameters}: {" ".join(str(e).split())}') from e
    self._env = {name: env[name] for name in PASSED_ON}
    self._jobs: dict[Row, tuple[Record, int]] = {}  # and how often the queue has missed it
    self._asked: set[Row] = set()
    self._left = False
    self._looked_s = -ASK_S

  def room(self) -> int:
    return UNLIMITED

  def start(self, rows: Sequence[tuple[Row, Record]]) -> None:
    queue = _queue() if any(record.job for _, record in rows) else set()
    new = []
    for row, record in rows:
      if record.job and (record.job in (queue or ()) or self._result(record.job).is_file()):
        self._jobs[row] = record, 0
      else:
        new.append((row, record))
    if not new:
      return
    work = []
    for row, record in new:
      record.starts += 1
      record.write(row)  # makes the folder, where the log will be
      work.append(RowJob(row.command, str(row.folder), self._env))
    try:
      # sbatch's complaint is in the error too
      with contextlib.redirect_stderr(io.StringIO()), self._executor.batch():
        jobs = [self._executor.submit(job) for job in work]
    except self._submitit.core.utils.FailedJobError as e:
      reason = ' '.join(str(e).split()).rstrip('.')
      raise SweepError(
        f'sbatch refuses the jobs: {reason}. Give --slurm what the site wants, from a machine '
        'where sbatch works by hand.'
      ) from e
    for (row, record), job in zip(new, jobs, strict=True):
      record.job = job.job_id
      record.write(row)
      self._jobs[row] = record, 0

  def poll(self) -> list[Row]:
    if self._left:
      rows, self._jobs = list(self._jobs), {}
      return rows
    if time.monotonic() - self._looked_s < ASK_S:
      return []
    self._looked_s = time.monotonic()
    queue, ended = _queue(), []
    for row, (record, missed) in list(self._jobs.items()):
      result = self._result(record.job)
      if result.is_file():
        self._settle(row, record, _load(result))
      elif queue is None or record.job in queue:
        self._jobs[row] = record, 0
        continue
      elif missed < MISSED:
        self._jobs[row] = record, missed + 1
        continue
      else:
        record.settle(row, 0 if row in self._asked else None)
      record.job = ''
      del self._jobs[row]
      ended.append(row)
    return ended

  def stop(self, row: Row) -> None:
    if row in self._jobs and row not in self._asked:
      self._asked.add(row)
      subprocess.run(['scancel', self._jobs[row][0].job], check=False)

  def stop_all(self) -> None:
    self._left = True

  def kill_all(self) -> None: ...

  def _settle(self, row: Row, record: Record, outcome: tuple[str, Any]) -> None:
    kind, value = outcome
    if kind == 'success':
      code, log_start = value
      record.settle(row, 0 if row in self._asked and code < 0 else code, log_start=log_start)
    else:  # our own code on the node failed: submitit has its traceback
      record.state, record.error = State.FAILED, str(value).strip()

  def _result(self, job: str) -> Path:
    return self._submitit.SlurmJob(folder=self._folder, job_id=job).paths.result_pickle


def _parse(parameters: str) -> dict[str, Any]:
  values: dict[str, Any] = {}
  for part in filter(None, parameters.split(',')):
    name, equals, value = part.partition('=')
    if not equals:
      raise SweepError(f'--slurm: {part!r} has no value. Write name=value, divided by commas.')
    values[name.strip()] = int(value) if value.isdigit() else value
  return values


def _queue() -> set[str] | None:
  """Ids of all jobs that wait or run; None where Slurm does not answer."""
  command = ['squeue', '--noheader', '--array', '--format=%i', '--me']
  answer = subprocess.run(command, capture_output=True, text=True, check=False)
  return set(answer.stdout.split()) if answer.returncode == 0 else None


def _load(path: Path) -> tuple[str, Any]:
  with path.open('rb') as file:
    return pickle.load(file)
