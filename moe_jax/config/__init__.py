"""Every setting of a run, as frozen dataclasses that refuse impossible values.

`moe_jax.config_io.build` makes a `RunConfig` from a ConfigDict once, at the door of the program;
below it nothing reads a dictionary.
"""

from moe_jax.config.model import (
  ATTENTION_KINDS,
  DSAConfig,
  FullAttentionConfig,
  LayerKind,
  MLAConfig,
  MoBAConfig,
  ModelConfig,
  MoEConfig,
  NSAConfig,
  RopeConfig,
)
from moe_jax.config.rules import require
from moe_jax.config.run import (
  PRECISIONS,
  CheckpointConfig,
  DataConfig,
  DomainConfig,
  EvalConfig,
  GuardConfig,
  LogConfig,
  MeshConfig,
  OptimConfig,
  RunConfig,
  SampleConfig,
)

__all__ = [
  'ATTENTION_KINDS',
  'PRECISIONS',
  'CheckpointConfig',
  'DSAConfig',
  'DataConfig',
  'DomainConfig',
  'EvalConfig',
  'FullAttentionConfig',
  'GuardConfig',
  'LayerKind',
  'LogConfig',
  'MLAConfig',
  'MeshConfig',
  'MoBAConfig',
  'MoEConfig',
  'ModelConfig',
  'NSAConfig',
  'OptimConfig',
  'RopeConfig',
  'RunConfig',
  'SampleConfig',
  'require',
]
