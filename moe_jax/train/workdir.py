"""The folder of one run: one writer at a time, one config for its whole life."""

import fcntl
import fnmatch
import json
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax

from moe_jax.config_io import flatten
from moe_jax.train.digests import sync_folder
from moe_jax.train.processes import raise_together

_ABSENT = '(absent)'


class WorkdirError(ValueError):
  """The workdir cannot be used; one line with the reason and the remedy."""


class Workdir:
  """Names the parts of a workdir. `Workdir(path)` only reads; `Workdir.open` takes it for a run.

  with Workdir.open(path, config, may_change=('steps', 'mesh.*')) as workdir: ...
  """

  def __init__(self, path: Path | str):
    self.path = Path(path).absolute()
    self._lock: IO[str] | None = None

  @property
  def config(self) -> Path:
    return self.path / 'config.json'

  @property
  def checkpoints(self) -> Path:
    return self.path / 'checkpoints'

  @property
  def metrics(self) -> Path:
    return self.path / 'metrics.jsonl'

  @property
  def tensorboard(self) -> Path:
    return self.path / 'tb'

  @property
  def report(self) -> Path:
    return self.path / 'report.md'

  @classmethod
  def open(
    cls,
    path: Path | str,
    config: Mapping[str, Any],
    *,
    may_change: tuple[str, ...],
    defaults: Mapping[str, Any] | None = None,
  ) -> 'Workdir':
    """Makes the folder, locks it against other runs, and writes or compares config.json.

    With several processes all call it, and process 0 does the work.

    Args:
      config: JSON values, nested as in `moe_jax.config_io.to_dict`.
      may_change: dotted names, `*` allowed, of fields that a resumed run may set differently.
      defaults: what fields had before they existed, for workdirs made by an older version.

    Raises:
      WorkdirError: on every process: in use, made with another config, unreadable, or not writable.
    """
    self, error = cls(path), None
    if jax.process_index() == 0:
      try:
        plain = json.loads(json.dumps([config, defaults or {}]))
        self._take(plain[0], plain[1], may_change)
      except WorkdirError as e:
        error = e
      except OSError as e:
        # a file in place of the folder; in place of a parent it is a NotADirectoryError
        reason = 'it is not a folder' if isinstance(e, FileExistsError) else e.strerror
        error = WorkdirError(
          f'workdir={self.path} cannot be used: {reason}. '
          'Make it writable or choose another --workdir.'
        )
    try:
      raise_together(error, WorkdirError)
    except WorkdirError:
      self.close()
      raise
    return self

  def __enter__(self) -> 'Workdir':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Lets other runs in; a process that dies does so too."""
    if self._lock:
      self._lock.close()
      self._lock = None

  def read_config(self) -> dict[str, Any]:
    """Returns config.json; raises WorkdirError where there is none or it is not JSON."""
    try:
      config = json.loads(self.config.read_text())
    except FileNotFoundError:
      raise WorkdirError(
        f'workdir={self.path} has no config.json: no run was made there. Choose another --workdir.'
      ) from None
    except ValueError:
      config = None
    if not isinstance(config, dict):
      raise WorkdirError(
        f'{self.config} is damaged: it is not a JSON object. Put it back from a copy, or remove it '
        'if you are sure that the run was made with the config you give now.'
      )
    return config

  def compare(
    self,
    config: Mapping[str, Any],
    *,
    may_change: tuple[str, ...],
    defaults: Mapping[str, Any] | None = None,
  ) -> bool:
    """Whether `config` (JSON values) differs from config.json; arguments are those of `open`.

    Raises:
      WorkdirError: it differs in a field that may not change, or config.json cannot be read.
    """
    old, new = flatten(defaults or {}) | flatten(self.read_config()), flatten(config)
    changed = {n: (old.get(n, _ABSENT), new.get(n, _ABSENT)) for n in old | new}
    changed = {n: (a, b) for n, (a, b) in changed.items() if a != b}
    refused = [
      f'{n}: {a} -> {b}'
      for n, (a, b) in changed.items()
      if not any(fnmatch.fnmatchcase(n, pattern) for pattern in may_change)
    ]
    if refused:
      raise WorkdirError(
        f'workdir={self.path} was made with another config: {"; ".join(refused)}. '
        'Set these back or choose another --workdir.'
      )
    return bool(changed)

  def _take(
    self, config: dict[str, Any], defaults: dict[str, Any], may_change: tuple[str, ...]
  ) -> None:
    self.path.mkdir(parents=True, exist_ok=True)
    self._lock = open(self.path / '.lock', 'a+')  # noqa: SIM115
    try:
      # the kernel drops the lock with the process, so a lock left by a dead run is no obstacle
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._lock.seek(0)
      holder = self._lock.read().strip() or 'another process'
      raise WorkdirError(
        f'workdir={self.path} is in use by {holder}. Wait for it or choose another --workdir.'
      ) from None
    self._lock.truncate(0)
    self._lock.write(f'process {os.getpid()} on host {socket.gethostname()}\n')
    self._lock.flush()

    old = self.config.exists()
    if old and not self.compare(config, may_change=may_change, defaults=defaults):
      return
    atomic_write_text(self.config, json.dumps(config, indent=2) + '\n')


def atomic_write_text(path: Path, text: str) -> None:
  """Replaces a file by way of a temporary one: a reader or a kill meets the old text or the new."""
  descriptor, name = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
  temporary = Path(name)
  try:
    with open(descriptor, 'w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    temporary.chmod(0o644)  # mkstemp's 0600 would keep colleagues from reading a run
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  sync_folder(path.parent)
