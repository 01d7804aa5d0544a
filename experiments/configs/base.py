"""What every config starts from: all fields with their defaults, and the check of its argument."""

import ml_collections

from moe_jax import config_io, routing
from moe_jax.config import RunConfig


def check_argument(arg: str, *known: str) -> None:
  """Raises ValueError where ARG of --config=FILE.py:ARG is not one that the file has."""
  if arg not in known:
    raise ValueError(f'{arg!r} is not an argument of this config. {config_io.nearest(arg, known)}')


def base() -> ml_collections.ConfigDict:
  """The fields that `--config.FIELD=VALUE` may override, those of every balancing idea too."""
  c = ml_collections.ConfigDict(config_io.to_dict(RunConfig()))
  c.routing = routing.default_fields()
  return c
