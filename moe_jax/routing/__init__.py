"""Balancing ideas, one file each, chosen by name: `--config.balance=loss_free+sequence_wise`.

Every module of this folder is imported and every `Idea` with a name is known; adding a file is all
it takes. `base` says what an idea may do.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from moe_jax import config_io
from moe_jax.config import MoEConfig
from moe_jax.routing.balance import Balance
from moe_jax.routing.base import Gate, Idea, Seen, Sizes, State

__all__ = [
  'Balance',
  'Gate',
  'Idea',
  'Seen',
  'Sizes',
  'State',
  'choose',
  'default_fields',
  'ideas',
]


def ideas() -> dict[str, type[Idea]]:
  """Every known idea by name."""
  for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{module.name}')
  return {c.name: c for c in sorted(Idea.__subclasses__(), key=lambda c: c.name) if c.name}


def default_fields() -> dict[str, dict[str, Any]]:
  """{idea: {field: default}}: what `config.routing` offers for overriding."""
  return {
    name: {f.name: f.default for f in dataclasses.fields(idea)} for name, idea in ideas().items()
  }


def choose(balance: str, fields: Mapping[str, Mapping[str, Any]], moe: MoEConfig) -> Balance:
  """Makes the ideas named in `balance`, joined by '+', with their fields; 'none' is no idea.

  Args:
    moe: the layers that they are to serve.

  Raises:
    ValueError: an unknown idea (the nearest is suggested), one named twice, a wrong field, ideas
      that do not go together, or a layer that one cannot serve.
  """
  known = ideas()
  for name in fields:
    if name not in known:
      raise ValueError(f'routing.{name} is not a balancing idea. {config_io.nearest(name, known)}')
  names = [] if balance == 'none' else balance.split('+')
  for name in names:
    if name not in known:
      raise ValueError(
        f'balance={balance!r}: {name!r} is not a balancing idea. '
        f'{config_io.nearest(name, {*known, "none"})}'
      )
    if names.count(name) > 1:
      raise ValueError(f'balance={balance!r} names {name!r} twice. Name it once.')
  # fields of ideas that are not named are checked too: a slip there is a slip
  made = {n: config_io.build(values, known[n], f'routing.{n}.') for n, values in fields.items()}
  chosen = Balance(tuple(made[name] if name in made else known[name]() for name in names))
  chosen.check(moe)
  return chosen
