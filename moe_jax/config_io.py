"""From a ConfigDict to the frozen dataclasses of `moe_jax.config`, and back to plain values."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from moe_jax.config import RunConfig


def nearest(name: str, choices: typing.Iterable[str]) -> str:
  """Returns ' Did you mean X?' for the closest choice, or the choices where none is close."""
  choices = sorted(choices)
  close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
  return f'Did you mean {close[0]}?' if close else f'Known here: {", ".join(choices)}.'


def build(values: Mapping[str, Any], kind: Any = RunConfig, path: str = '') -> Any:
  """Makes dataclass `kind` from nested mappings; fields left out keep their defaults.

  Raises:
    ValueError: one line, for an unknown field (with the nearest known one), a missing one, a wrong
      type, or a value that the dataclass itself refuses.
  """
  hints = typing.get_type_hints(kind)
  fields = dataclasses.fields(kind)
  known = {f.name for f in fields}
  for name in values:
    if name not in known:
      raise ValueError(f'{path}{name} is not a field of this config. {nearest(name, known)}')
  for f in fields:
    if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
      raise ValueError(f'{path}{f.name} is missing and has no default. Give it a value.')
  return kind(**{name: _convert(v, hints[name], f'{path}{name}') for name, v in values.items()})


def _convert(value: Any, hint: Any, path: str) -> Any:
  origin = typing.get_origin(hint)
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, Mapping):
      raise ValueError(f'{path}={value!r} must be a group of fields, not a {_name(type(value))}.')
    return build(value, hint, f'{path}.')
  if origin in (types.UnionType, typing.Union):
    for choice in typing.get_args(hint):
      try:
        return _convert(value, choice, path)
      except ValueError:
        continue
  elif origin is tuple:
    if isinstance(value, (tuple, list)):
      item = typing.get_args(hint)[0]
      return tuple(_convert(v, item, f'{path}[{i}]') for i, v in enumerate(value))
  elif origin is not None and issubclass(origin, Mapping):
    if isinstance(value, Mapping):
      item = typing.get_args(hint)[1]
      return {k: _convert(v, item, f'{path}.{k}') for k, v in value.items()}
  elif hint is Any or (type(value) is hint):
    return value
  elif hint is float and type(value) is int:
    return float(value)
  raise ValueError(
    f'{path}={value!r} must be {_name(hint)}, not {_name(type(value))}. '
    'Give a value of that type (integers take no exponent: write 10000, not 1e4).'
  )


def _name(hint: Any) -> str:
  return getattr(hint, '__name__', str(hint)) if typing.get_origin(hint) is None else str(hint)


def to_dict(config: Any) -> Any:
  """Turns nested dataclasses into dicts, ready for JSON; tuples stay tuples."""
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, Mapping):
    return {k: to_dict(v) for k, v in config.items()}
  return config


def flatten(values: Mapping[str, Any], path: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for name, value in values.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f'{path}{name}.')
    else:
      flat[f'{path}{name}'] = value
  return flat
