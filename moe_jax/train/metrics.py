"""Writes and reads a run's metrics: metrics.jsonl always, TensorBoard and one tracker by choice.

The JSONL file is the record; everything else is a view of it. One line is one call:
{"step": 3, "train/loss": 5.1, ...} or {"step": 3, "event": "rollback", ...}. JSON has no NaN or
infinity, so these are the strings "nan", "inf" and "-inf"; `read_metrics` makes them floats again.
"""

# N recorded steps  L MoE layers  E experts

import dataclasses
import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import LogConfig
from moe_jax.config_io import nearest

FILE = 'metrics.jsonl'
TENSORBOARD_FLUSH_S = 10.0


@dataclasses.dataclass(frozen=True)
class Metrics:
  """What a run has recorded. `name in metrics` tells whether a series exists."""

  rows: list[dict[str, Any]]  # metric lines, in the file's order
  events: list[dict[str, Any]]
  unreadable: int = 0  # lines that are not JSON: torn by a kill or a full disk

  def __contains__(self, name: str) -> bool:
    return any(name in row for row in self.rows)

  @property
  def names(self) -> list[str]:
    return sorted({name for row in self.rows for name in row} - {'step'})

  def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps int64 [N], values float64 [N], [N, L] or [N, L, E]), by rising step.

    Where a step was written twice (an evaluation repeated after a restart) the later line counts.
    """
    found = {row['step']: row[name] for row in self.rows if name in row}
    if not found:
      raise ValueError(f'{name} is not among the metrics of this run. {nearest(name, self.names)}')
    steps = sorted(found)
    return np.array(steps, np.int64), np.array([found[s] for s in steps], np.float64)


def read_metrics(workdir: str | Path) -> Metrics:
  """Reads a workdir's metrics.jsonl, also while the run is still writing it."""
  path = Path(workdir) / FILE
  if not path.is_file():
    raise ValueError(f'{path} does not exist. Give the workdir of a run that has started.')
  metrics = Metrics(rows=[], events=[])
  unreadable = 0
  for _, row in _lines(path):
    if row is None:
      unreadable += 1
    else:
      (metrics.events if 'event' in row else metrics.rows).append(row)
  return dataclasses.replace(metrics, unreadable=unreadable)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
  """Yields every line with its content, None where it is torn."""
  with path.open('rb') as file:
    for line in file:
      try:
        row = json.loads(line)
      except ValueError:  # half a character is a UnicodeDecodeError, which is one too
        row = None
      yield line.rstrip(b'\n') + b'\n', row if isinstance(row, dict) and 'step' in row else None


class MetricsWriter:
  """Appends a run's metrics; on a resume first drops what came after the checkpoint.

  Args:
    config: the run's configuration as plain values, shown by TensorBoard and the tracker.
    last_step: step of the state that training continues from; 0 for a new run.

  Raises:
    ValueError: `log.tracker` names a package that is not installed. Nothing is written then.
  """

  def __init__(self, workdir: Path, log: LogConfig, *, config: dict[str, Any], last_step: int):
    tracker = import_tracker(log.tracker)
    self._path = workdir / FILE
    workdir.mkdir(parents=True, exist_ok=True)
    self._trim(last_step)
    self._file = self._path.open('ab')
    self._sinks: list[_TensorBoard | _Tracker] = []
    if log.tensorboard:
      self._sinks.append(_TensorBoard(workdir / 'tb', config, last_step))
    if tracker is not None:
      self._sinks.append(_Tracker(tracker, workdir, log, config))

  def write(self, step: int, values: Mapping[str, float | int | list]) -> None:
    """Records one step: numbers, lists [L] and lists of lists [L, E]."""
    self._append({'step': step, **values})
    for sink in self._sinks:
      sink.write(step, values)

  def event(self, step: int, kind: str, **fields: Any) -> None:
    """Records that something happened: a resume, a rollback, a save."""
    self._append({'step': step, 'event': kind, **fields})

  def rewind(self, step: int) -> None:
    """Forgets the metrics of later steps, which are about to be made again; events stay."""
    self._file.close()
    self._trim(step)
    self._file = self._path.open('ab')
    for sink in self._sinks:
      sink.rewind(step)

  def close(self) -> None:
    self._file.close()
    for sink in self._sinks:
      sink.close()

  def _append(self, row: dict[str, Any]) -> None:
    line = json.dumps(_plain(row), allow_nan=False)
    self._file.write(line.encode() + b'\n')
    self._file.flush()  # a kill loses at most the line being written

  def _trim(self, step: int) -> None:
    """Rewrites the file without torn lines and later metrics, in one atomic replacement."""
    if not self._path.exists():
      return
    kept = self._path.with_suffix('.jsonl.tmp')
    with kept.open('wb') as file:
      for line, row in _lines(self._path):
        if row is not None and ('event' in row or row['step'] <= step):
          file.write(line)
      file.flush()
      os.fsync(file.fileno())
    kept.replace(self._path)


def _plain(value: Any) -> Any:
  """Makes a value that strict JSON can hold: arrays become lists, NaN and inf become strings."""
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if hasattr(value, 'tolist'):  # NumPy and JAX, scalars too
    return _plain(value.tolist())
  if isinstance(value, bool):
    return int(value)
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def first_moe_layer(config: Mapping[str, Any]) -> int:
  """Index in the model of the first layer with experts: metrics count from it, readers from 0."""
  return config.get('model', {}).get('num_dense_layers', 0)


def first_of(name: str, first_moe: int) -> int:
  """The layer that a series [L] begins with: FP8 is watched in all layers, routing in those with
  experts."""
  return 0 if name.startswith('fp8/') else first_moe


class _TensorBoard:
  """Event files; a series [L] becomes one curve a layer, [L, E] one histogram a layer.

  tensorboardX's own SummaryWriter hands events to a thread; when the disk is full the thread dies
  and training waits for it forever. Here the caller writes and gets the OSError.
  """

  def __init__(self, folder: Path, config: dict[str, Any], last_step: int):
    # a reader of metrics.jsonl in a notebook should not wait for these imports
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._files, self._summary, self._proto = event_file_writer, summary, event_pb2
    self._value: Any = summary.Summary.Value
    self._folder, self._first_layer = folder, first_moe_layer(config)
    folder.mkdir(exist_ok=True)
    self._open(last_step)
    text = json.dumps(_plain(config), indent=2)
    self._add(last_step, self._summary.text('config', f'```\n{text}\n```').value)

  def rewind(self, step: int) -> None:
    self._writer.close()
    self._open(step)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    parts = []
    for name, value in values.items():
      array = np.asarray(value, np.float64)
      rows = {name: array}
      if array.ndim:
        layers = enumerate(array, start=first_of(name, self._first_layer))
        rows = {f'{name}/layer_{layer:02}': row for layer, row in layers}
      for tag, row in rows.items():
        if row.ndim == 0:
          # tensorboardX's `scalar` logs a line for each NaN, into the progress bar
          parts.append(self._value(tag=tag, simple_value=row.item()))
        elif np.isfinite(row).all():  # a NaN falls into no bin
          parts += self._summary.histogram(tag, row, 'auto', max_bins=64).value
    self._add(step, parts)

  def close(self) -> None:
    self._writer.close()

  def _open(self, step: int) -> None:
    # TensorBoard reads files by name; two that begin in one second need an order
    self._writer = self._files.EventsWriter(str(self._folder / 'events'), f'.{time.time_ns()}')
    self._flushed_s = time.monotonic()
    session = self._proto.SessionLog(status=self._proto.SessionLog.START)
    # tells TensorBoard to forget this step and all after it
    self._writer.write_event(self._proto.Event(step=step + 1, session_log=session))

  def _add(self, step: int, parts: Iterable[Any]) -> None:
    summary = self._summary.Summary(value=parts)
    self._writer.write_event(self._proto.Event(wall_time=time.time(), step=step, summary=summary))
    if time.monotonic() - self._flushed_s > TENSORBOARD_FLUSH_S:
      self._writer.flush()
      self._flushed_s = time.monotonic()


class _Tracker:
  """Weights & Biases or trackio, whose `init`, `log` and `finish` are alike."""

  def __init__(self, module: Any, workdir: Path, log: LogConfig, config: dict[str, Any]):
    self._module, self._first_layer = module, first_moe_layer(config)
    name_file = workdir / 'tracker_name'  # a resumed run continues its curves under this name
    if not name_file.exists():
      name_file.write_text(f'{workdir.resolve().name}-{uuid.uuid4().hex[:8]}')
    name = name_file.read_text()
    own = {'id': name, 'dir': str(workdir)} if log.tracker == 'wandb' else {}
    module.init(project=log.project, name=name, config=_plain(config), resume='allow', **own)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    flat: dict[str, float] = {}
    for name, value in values.items():
      array = np.asarray(value, np.float64)
      if array.ndim == 0:
        flat[name] = array.item()
      elif array.ndim == 1:  # [L, E] stays in metrics.jsonl: a curve for every expert helps nobody
        for layer, item in enumerate(array, start=first_of(name, self._first_layer)):
          flat[f'{name}/layer_{layer:02}'] = item.item()
    if flat:
      self._module.log(flat, step=step)

  def rewind(self, step: int) -> None:
    """Nothing to do: a tracker's past cannot be changed. metrics.jsonl has the truth."""

  def close(self) -> None:
    self._module.finish()


def import_tracker(name: str) -> Any:
  """Returns the module that `log.tracker` names, None for 'none'; raises ValueError without it."""
  if name == 'none':
    return None
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ValueError(
      f'log.tracker={name!r} is not installed. Run `uv sync --extra tracking`, or set '
      'log.tracker=none.'
    ) from error
