"""The command line: --config=FILE:ARG, dotted overrides, and one clear line for every mistake."""

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from moe_jax import config_io


class UsageError(ValueError):
  """The command line cannot be obeyed; one line with the reason and the remedy."""


def define(values: flags.FlagValues) -> flags.FlagHolder:
  """Adds --config to `values`."""
  return config_flags.DEFINE_config_file(
    'config',
    help_string='A config file, with its argument behind a colon: FILE.py:ARG. '
    'Fields are overridden by --config.FIELD=VALUE.',
    lock_config=True,
    flag_values=values,
  )


def parse_flags(argv: Sequence[str], values: flags.FlagValues) -> None:
  """Parses plain flags; raises UsageError for one that is unknown or has an impossible value."""
  try:
    extra = values(argv)[1:]
  except flags.UnrecognizedFlagError as error:
    known = set(values) - {'flagfile', 'undefok'}
    nearest = config_io.nearest(error.flagname, known)
    raise UsageError(f'--{error.flagname} is not a flag. {nearest}') from error
  except flags.Error as error:
    raise UsageError(f'{one_line(error).removeprefix("flag ").rstrip(".")}.') from error
  if extra:
    raise UsageError(f'{extra[0]!r} is not understood. Flags are written --name=value.')


def parse(
  argv: Sequence[str], values: flags.FlagValues, config: flags.FlagHolder
) -> tuple[ml_collections.ConfigDict, list[str]]:
  """Returns the config with its overrides applied, and the overrides as given.

  Raises:
    UsageError: for whatever is wrong, in one line.
  """
  # config_flags looks for the config's file in sys.argv, whatever it is given to parse
  _check_file(argv)
  saved, sys.argv = sys.argv, list(argv)
  try:
    parse_flags(argv, values)
    chosen = config.value
  except Exception as error:
    raise UsageError(_explain(argv, error)) from error
  finally:
    sys.argv = saved
  if chosen is None:
    raise UsageError('--config is missing. Name a file, such as experiments/configs/quickstart.py.')
  return chosen, [a.removeprefix('--config.') for a in argv if a.startswith('--config.')]


def _given(argv: Sequence[str]) -> tuple[str | None, str, str]:
  """The value of --config, its file and its argument."""
  given = next((a.partition('=')[2] for a in argv if a.startswith('--config=')), None)
  file, _, arg = (given or '').partition(':')
  return given, file, arg


def _check_file(argv: Sequence[str]) -> None:
  given, file, _ = _given(argv)
  if given is not None and not Path(file).is_file():
    found = sorted(str(p) for p in Path('experiments/configs').rglob('*.py'))
    raise UsageError(
      f'--config={given}: there is no file {file!r}. {config_io.nearest(file, found)}'
    )


def _explain(argv: Sequence[str], error: Exception) -> str:
  given, file, arg = _given(argv)
  if isinstance(error, SyntaxError):
    return f'--config={given}: {file} is not Python: {error.msg} (line {error.lineno}).'
  if given is not None:
    try:
      known = load(file, arg)
    except Exception as e:
      reason = one_line(e).rstrip('.')
      return f'--config={given}: {file} failed: {reason}{"" if reason[-1] == "?" else "."}'
    for override in argv:
      if override.startswith('--config.'):
        name = override.removeprefix('--config.').partition('=')[0]
        problem = _unknown_field(known, name) or _wrong_type(known, *override[9:].split('=', 1))
        if problem:
          return problem
  return one_line(error).removeprefix('flag ')


def load(file: str, arg: str = '') -> ml_collections.ConfigDict:
  """Runs a config file's `get_config`, with `arg` where one is given."""
  spec = importlib.util.spec_from_file_location('config', file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if arg and not inspect.signature(module.get_config).parameters:
    raise UsageError(f'it takes no argument. Leave out :{arg}.')
  return module.get_config(arg) if arg else module.get_config()


def _unknown_field(config: ml_collections.ConfigDict, name: str) -> str | None:
  at, path = config, ''
  for part in name.split('.'):
    if not isinstance(at, ml_collections.ConfigDict):
      return f'config.{path[:-1]} is a value, not a group: it has no {part!r}.'
    if part not in at:
      return f'config.{path}{part} is not a field. {config_io.nearest(part, at.keys())}'
    at, path = at[part], f'{path}{part}.'
  return None


def _wrong_type(config: ml_collections.ConfigDict, name: str, value: str = '') -> str | None:
  *path, last = name.split('.')
  group: Any = config
  for part in path:
    group = group[part]
  kind = group.get_type(last)
  if kind not in (int, float):
    return None
  try:
    kind(value)
  except ValueError:
    hint = ' (integers take no exponent: write 10000, not 1e4)' if kind is int else ''
    return f'config.{name}={value!r} must be {kind.__name__}{hint}.'
  return None


def one_line(error: BaseException) -> str:
  """An error's text with its line breaks folded."""
  return ' '.join(str(error).split()) or type(error).__name__
