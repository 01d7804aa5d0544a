"""Every setting of a run, as frozen dataclasses that refuse impossible values.

`moe_jax.config_io.build` makes a `RunConfig` from a ConfigDict once, at the door of the program;
below it nothing reads a dictionary.
"""

from moe_jax.config.attention import (
  CompressedConfig,
  DSAConfig,
  FullAttentionConfig,
  MLAConfig,
  MoBAConfig,
  NSAConfig,
  RopeConfig,
)
from moe_jax.config.model import (
  ATTENTION_KINDS,
  COMPRESSED_KINDS,
  LayerKind,
  MHCConfig,
  ModelConfig,
  MoEConfig,
  MTPConfig,
)
from moe_jax.config.optim import GuardConfig, MuonConfig, OptimConfig
from moe_jax.config.precision import PRECISIONS, PrecisionOverrides
from moe_jax.config.rules import require
from moe_jax.config.run import (
  CheckpointConfig,
  DataConfig,
  DomainConfig,
  EvalConfig,
  LogConfig,
  MeshConfig,
  RunConfig,
  SampleConfig,
)

__all__ = [
  'ATTENTION_KINDS',
  'COMPRESSED_KINDS',
  'PRECISIONS',
  'CheckpointConfig',
  'CompressedConfig',
  'DSAConfig',
  'DataConfig',
  'DomainConfig',
  'EvalConfig',
  'FullAttentionConfig',
  'GuardConfig',
  'LayerKind',
  'LogConfig',
  'MHCConfig',
  'MLAConfig',
  'MTPConfig',
  'MeshConfig',
  'MoBAConfig',
  'MoEConfig',
  'ModelConfig',
  'MuonConfig',
  'NSAConfig',
  'OptimConfig',
  'PrecisionOverrides',
  'RopeConfig',
  'RunConfig',
  'SampleConfig',
  'require',
]
