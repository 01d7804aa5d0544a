"""From a sweep's file to rows that are known to be possible: one row is one run.

A row is checked by what will run it: its overrides go through the same command line, the same
dataclasses and the same balancing ideas, and all of that happens before anything starts.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

from experiments import flags as config_flags
from experiments import run as experiments_run
from moe_jax import config_io
from moe_jax.config import RunConfig
from moe_jax.data import load_tokenizer
from moe_jax.train.workdir import Workdir, WorkdirError

PROGRAM = ('-m', 'experiments.run')
SHOWN_ERRORS = 10
SLUG_LENGTH = 72


class SweepError(ValueError):
  """The sweep cannot run as it stands; a line for each reason, with its remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
  number: int  # from 1, in the order of the sweep
  overrides: Mapping[str, Any]  # dotted fields
  cfg: RunConfig
  workdir: Workdir
  command: tuple[str, ...]  # runs it, resumes it, or says that it is done

  @property
  def name(self) -> str:
    return self.workdir.path.name

  @property
  def folder(self) -> Path:
    return self.workdir.path

  @property
  def label(self) -> str:
    return describe(self.overrides)

  def summary(self) -> dict[str, Any] | None:
    """The run's summary.json once all of its steps are done, else None."""
    path = self.folder / 'summary.json'
    summary = json.loads(path.read_text()) if path.is_file() else {}
    return summary if summary.get('steps') == self.cfg.steps else None


@dataclasses.dataclass(frozen=True)
class Base:
  """What all rows of a sweep share."""

  config: str  # FILE:ARG, as for experiments.run
  common: tuple[str, ...]  # further flags of every row, '--config.FIELD=VALUE'
  folder: Path  # of the sweep

  def row(self, number: int, overrides: Mapping[str, Any]) -> Row:
    """Makes and checks one row; raises ValueError with a line that names the field."""
    fields = config_io.flatten({name: _plain(value) for name, value in overrides.items()})
    for flag in self.common:
      field = flag.removeprefix('--config.').partition('=')[0]
      if field in fields:
        raise SweepError(f'{flag} is also set by the row. Leave one of them out.')
    given = [f'--config.{name}={_text(name, value)}' for name, value in fields.items()]
    arguments = [f'--config={self.config}', *self.common, *given]
    values = flags.FlagValues()
    raw, _ = config_flags.parse(['run', *arguments], values, config_flags.define(values))
    for name, value in fields.items():
      understood: Any = raw
      for part in name.split('.'):
        understood = understood[part]
      if understood != value:
        raise SweepError(f'{name}={value!r} is read as {understood!r}. Give a value of its type.')
    cfg = config_io.build(raw.to_dict())
    experiments_run.check(cfg)
    experiments_run.check_vocabulary(cfg, _vocabulary(cfg.data.tokenizer))
    workdir = Workdir(self.folder / 'rows' / name_of(fields))
    if workdir.config.exists():
      workdir.compare(
        _recorded(cfg), may_change=experiments_run.MAY_CHANGE, defaults=experiments_run.defaults()
      )
    command = (sys.executable, *PROGRAM, *arguments, f'--workdir={workdir.path}')
    return Row(number, fields, cfg, workdir, command)


def load_file(path: str) -> ModuleType:
  """Runs a sweep's file, which defines `sweep()` or `search(trial)`."""
  if not Path(path).is_file():
    found = sorted(str(p) for p in Path('sweeps').glob('*.py') if _is_sweep(p))
    raise SweepError(f'--sweep={path}: there is no such file. {config_io.nearest(path, found)}')
  spec = importlib.util.spec_from_file_location('sweep_file', path)
  if spec is None or spec.loader is None:
    raise SweepError(f'--sweep={path} is not a Python file. Its name must end in .py.')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as e:
    raise SweepError(f'--sweep={path} is not Python: {e.msg} (line {e.lineno}).') from e
  except Exception as e:
    raise SweepError(f'--sweep={path} failed: {_reason(e)}.') from e
  if hasattr(module, 'sweep') == hasattr(module, 'search'):
    raise SweepError(
      f'--sweep={path} must define either sweep(), which yields rows, or search(trial).'
    )
  return module


def make_rows(overrides: Iterable[Mapping[str, Any]], base: Base) -> list[Row]:
  """Checks all rows of a sweep.

  Raises:
    SweepError: a line for each row that is impossible or is there already, at most ten.
  """
  rows, errors, seen = [], [], {}
  for number, row in enumerate(overrides, 1):
    if not isinstance(row, Mapping):
      raise SweepError(f'row {number} is {row!r}. Yield dicts of overrides, such as {{"seed": 0}}.')
    try:
      made = base.row(number, row)
    except ValueError as e:
      errors.append(f'row {number} ({describe(row)}): {_explain(e)}')
      continue
    same = seen.setdefault(json.dumps(_recorded(made.cfg), sort_keys=True), made)
    if same is not made:
      errors.append(
        f'row {number} ({made.label}) is the same run as row {same.number} ({same.label}). '
        'Leave one of them out.'
      )
    rows.append(made)
  if len(errors) > SHOWN_ERRORS:
    errors = [*errors[:SHOWN_ERRORS], f'and {len(errors) - SHOWN_ERRORS} more rows like these.']
  if errors:
    raise SweepError('\n'.join(errors))
  if not rows:
    raise SweepError('the sweep has no rows. Yield at least one dict of overrides.')
  return rows


def describe(overrides: Mapping[str, Any]) -> str:
  """'balance=none, seed=0', or 'no overrides'."""
  return ', '.join(f'{name}={_shown(v)}' for name, v in overrides.items()) or 'no overrides'


def name_of(fields: Mapping[str, Any]) -> str:
  """A folder's name: readable, and the same whatever the order of rows and of fields."""
  canonical = json.dumps({n: _shown(v) for n, v in sorted(fields.items())})
  digest = hashlib.blake2b(canonical.encode(), digest_size=4).hexdigest()
  parts = (f'{name.rpartition(".")[2]}={_shown(value)}' for name, value in fields.items())
  slug = re.sub(r'[^A-Za-z0-9.=+_-]+', '-', '_'.join(parts))[:SLUG_LENGTH].strip('-._')
  return f'{slug or "base"}-{digest}'


def command_line(row: Row) -> str:
  return shlex.join(('python', *row.command[1:]))


@functools.cache
def _vocabulary(tokenizer: str) -> int:
  return load_tokenizer(tokenizer).vocab_size


def _recorded(cfg: RunConfig) -> dict[str, Any]:
  return json.loads(json.dumps(experiments_run.recorded(cfg)))


def _plain(value: Any) -> Any:
  """NumPy's numbers as Python's, lists as tuples: the types that configs have."""
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  if hasattr(value, 'tolist'):
    value = value.tolist()
  return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


def _text(name: str, value: Any) -> str:
  """A value as the command line takes it."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, int | float | str | tuple):
    return str(value)
  raise SweepError(
    f'{name}={value!r} is a {type(value).__name__}. Give a number, text, true or false, or a tuple.'
  )


def _shown(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) and float(f'{value:g}') == value else str(value)


def _explain(error: ValueError) -> str:
  text = _reason(error)
  if isinstance(error, WorkdirError):
    return f'{text} Or remove that folder to run the row again.'
  return text


def _reason(error: Exception) -> str:
  return config_flags.one_line(error)


def _is_sweep(path: Path) -> bool:
  return bool(re.search(r'^def (sweep|search)\(', path.read_text(), re.M))


def common_flags(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
  """Parts argv: the program's own flags, and the '--config.FIELD=VALUE' of every row."""
  own = [a for a in argv if not a.startswith('--config.')]
  return own, tuple(a for a in argv if a.startswith('--config.'))
