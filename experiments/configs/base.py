"""The fields every config has, with their defaults: what `--config.FIELD=VALUE` may override."""

import ml_collections

from moe_jax import config_io, routing
from moe_jax.config import RunConfig


def base() -> ml_collections.ConfigDict:
  """All defaults of `moe_jax.config.RunConfig`, and the fields of every balancing idea."""
  c = ml_collections.ConfigDict(config_io.to_dict(RunConfig()))
  c.routing = routing.default_fields()
  return c
