"""Multi-token prediction in a checkpoint: what V3 and V4 share.

config.json counts the modules, yet checkpoints written by transformers say so and leave them out:
a model has modules where the tensors are there. Published checkpoints repeat the embedding and the
output head in every module; import leaves these copies out, export writes them.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from moe_jax.config import ModelConfig, MTPConfig

COPIES = 'copies of the embedding and the output head'


def read_modules(f: Any) -> MTPConfig:
  return MTPConfig(num_modules=f.get('num_nextn_predict_layers', int, 0))


def as_present(cfg: ModelConfig, family: Any, names: Iterable[str]) -> ModelConfig:
  """The config without modules where none of their tensors is among `names`."""
  if not cfg.mtp.num_modules or any(family.is_ahead(cfg, name) for name in names):
    return cfg
  return dataclasses.replace(cfg, mtp=MTPConfig())


def objection(cfg: ModelConfig) -> str:
  """Of the generations that have none."""
  return 'mtp.num_modules should be 0' if cfg.mtp.num_modules else ''
