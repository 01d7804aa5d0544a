"""A run: its data, mesh, and what it writes down, beside model and optimizer.

A field's comment gives its unit; a rule that ties fields together stands in `__post_init__`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.config.model import COMPRESSED_KINDS, ModelConfig
from moe_jax.config.optim import GuardConfig, OptimConfig
from moe_jax.config.precision import FP8_BLOCK, PRECISIONS, PrecisionOverrides
from moe_jax.config.rules import not_negative, one_of, positive, require

TRACKERS = ('none', 'wandb', 'trackio')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainConfig:
  """One kind of text in the mixture.

  `source` is `plays` or `code` (installed with the package), `synthetic`, or a path: a .jsonl file
  with a "text" field, a .txt or .md file, or a folder of these.
  """

  source: str
  weight: float = 1.0  # share of tokens, relative to the other domains'
  max_megabytes: float = 0.0  # read at most this much text; 0 reads it all

  def __post_init__(self):
    positive(self, 'data.domains.*', 'weight')
    not_negative(self, 'data.domains.*', 'max_megabytes')
    require(bool(self.source), 'data.domains.*.source', self.source, 'is empty', 'Name a source.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The text, its tokenizer, and the shape of a batch."""

  # bytes | deepseek | deepseek:N (its first N ids) | path of a tokenizer.json
  tokenizer: str = 'deepseek:4096'
  domains: Mapping[str, DomainConfig] = dataclasses.field(
    default_factory=lambda: {'plays': DomainConfig(source='plays')}
  )
  batch_size: int = 16  # sequences a step, over all devices and micro-batches
  sequence_length: int = 256  # tokens a sequence
  validation_fraction: float = 0.05  # share of each domain's documents held out
  cache_dir: str = ''  # tokenized text; empty: under the user's cache folder

  def __post_init__(self):
    positive(self, 'data', 'batch_size')
    require(
      self.sequence_length >= 2,
      'data.sequence_length',
      self.sequence_length,
      'must be at least 2: a token predicts the next one',
      'Raise it.',
    )
    require(
      0 < self.validation_fraction < 1,
      'data.validation_fraction',
      self.validation_fraction,
      'must lie in (0, 1)',
      'It is a share of the documents.',
    )
    require(
      len(self.domains) > 0,
      'data.domains',
      dict(self.domains),
      'is empty',
      'Name at least one domain.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; data=-1 takes what the other two leave."""

  data: int = -1
  expert: int = 1
  model: int = 1

  def __post_init__(self):
    positive(self, 'mesh', 'expert', 'model')
    require(
      self.data == -1 or self.data > 0,
      'mesh.data',
      self.data,
      'must be positive, or -1 for the devices that remain',
      'Give a count of devices.',
    )

  def shape(self, num_devices: int) -> tuple[int, int, int]:
    """Resolves -1 against the devices present; raises ValueError where they do not fit."""
    rest = self.expert * self.model
    data = num_devices // rest if self.data == -1 else self.data
    require(
      data * rest == num_devices,
      'mesh',
      (self.data, self.expert, self.model),
      f'(data, expert, model) does not make {num_devices}, the number of devices',
      'Change mesh.data, mesh.expert or mesh.model so that their product does.',
    )
    return data, self.expert, self.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  interval_steps: int = 50
  keep: int = 3

  def __post_init__(self):
    positive(self, 'checkpoint', 'interval_steps')
    require(
      self.keep >= 2,
      'checkpoint.keep',
      self.keep,
      'must be at least 2: a damaged checkpoint falls back to the one before',
      'Raise it.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  interval_steps: int = 50
  batches: int = 8

  def __post_init__(self):
    positive(self, 'eval', 'interval_steps', 'batches')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  # how often the load of every expert is written, not only its extremes
  load_interval_steps: int = 10
  precision_interval_steps: int = 100  # how often FP8 policies are watched, see train.watch
  lost_share: float = 0.01  # of a layer's gradient lost to underflow that brings a warning
  tensorboard: bool = True
  tracker: str = 'none'  # none | wandb | trackio
  project: str = 'moe_jax'

  def __post_init__(self):
    positive(self, 'log', 'load_interval_steps', 'precision_interval_steps', 'lost_share')
    one_of(self, 'log', 'tracker', TRACKERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """The text written at the end of a run."""

  prompt: str = 'To be, or not to be'
  num_tokens: int = 100
  temperature: float = 0.8
  top_p: float = 0.95

  def __post_init__(self):
    not_negative(self, 'sample', 'num_tokens', 'temperature')
    require(
      0 < self.top_p <= 1, 'sample.top_p', self.top_p, 'must lie in (0, 1]', 'Use 1 for no cut.'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """A whole run. `balance` names ideas of moe_jax.routing joined by '+', `routing` their fields."""

  seed: int = 0
  # folder to take parameters and selection biases from, of import_hf or Hugging Face; '': random
  init_from: str = ''
  steps: int = 100
  microbatches: int = 1  # gradient accumulation: parts that a batch is computed in
  precision: str = 'float32'  # a policy of moe_jax.precision
  precision_overrides: PrecisionOverrides = PrecisionOverrides()
  balance: str = 'loss_free+sequence_wise'
  routing: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  optim: OptimConfig = OptimConfig()
  guard: GuardConfig = GuardConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  eval: EvalConfig = EvalConfig()
  log: LogConfig = LogConfig()
  sample: SampleConfig = SampleConfig()

  def __post_init__(self):
    positive(self, 'config', 'steps', 'microbatches')
    one_of(self, 'config', 'precision', PRECISIONS)
    if self.precision.startswith('fp8'):
      # other widths are filled up to whole blocks
      widths = {'d_model': self.model.d_model}
      if any(layer.feed_forward != 'dense' for layer in self.model.layers):
        widths['moe.d_expert'] = self.model.moe.d_expert
      for name, width in widths.items():
        require(
          width % FP8_BLOCK == 0,
          f'model.{name}',
          width,
          f'must be a multiple of {FP8_BLOCK}, the side of a block that shares a scale, with '
          f'precision={self.precision!r}',
          "Change it, or use precision='bfloat16'.",
        )
    require(
      self.data.batch_size % self.microbatches == 0,
      'microbatches',
      self.microbatches,
      f'must divide data.batch_size={self.data.batch_size}',
      'Choose a divisor.',
    )
    require(
      self.model.mtp.num_modules < self.data.sequence_length,
      'model.mtp.num_modules',
      self.model.mtp.num_modules,
      f'looks past the end of data.sequence_length={self.data.sequence_length} tokens',
      'Lower it or lengthen the sequences.',
    )

  @property
  def tokens_per_step(self) -> int:
    return self.data.batch_size * self.data.sequence_length

  def check_mesh(self, num_devices: int) -> tuple[int, int, int]:
    """Refuses sizes that do not divide over the mesh; returns (data, expert, model)."""
    data, expert, model = self.mesh.shape(num_devices)
    m, rows = self.model, self.data.batch_size // self.microbatches
    require(
      rows % (data * expert) == 0,
      'data.batch_size',
      self.data.batch_size,
      f'over microbatches={self.microbatches} gives {rows} sequences, not a multiple of the '
      f'{data * expert} devices (mesh.data * mesh.expert) that share them',
      f'Use a multiple of {data * expert * self.microbatches}.',
    )
    kinds = {layer.attention for layer in m.layers}
    groups = {'compressed' if kind in COMPRESSED_KINDS else kind for kind in kinds}
    split = ('num_heads', 'num_kv_heads', 'num_index_heads', 'num_groups')
    sizes = {
      f'{group}.{name}': getattr(getattr(m, group), name)
      for group in sorted(groups)
      for name in split
      if hasattr(getattr(m, group), name)
    } | {
      'd_ff': m.d_ff,
      'vocab_size': m.vocab_size,
      'd_expert': m.moe.d_expert,
    }
    for name, size in sizes.items():
      require(
        size % model == 0,
        f'model.{name}',
        size,
        f'must be a multiple of mesh.model={model}',
        'Change one of them.',
      )
    require(
      m.moe.num_experts % expert == 0,
      'model.moe.num_experts',
      m.moe.num_experts,
      f'must be a multiple of mesh.expert={expert}',
      'Change one of them.',
    )
    require(
      m.d_model % data == 0,
      'model.d_model',
      m.d_model,
      f'must be a multiple of mesh.data={data}: parameters are split over it',
      'Change one of them.',
    )
    return data, expert, model
