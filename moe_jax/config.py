"""Every setting of a run, as frozen dataclasses that refuse impossible values.

`moe_jax.config_io.build` makes a `RunConfig` from a ConfigDict once, at the door of the program; below it nothing
reads a dictionary. A field's comment gives its unit; a rule that ties fields together stands in `__post_init__`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

ATTENTION_KINDS = ('full', 'mla')
FEED_FORWARD_KINDS = ('dense', 'moe')
SCORES = ('softmax', 'sigmoid')
GROUP_SCORES = ('max', 'top2')
REMAT = ('none', 'full', 'dots')
SCHEDULES = ('constant', 'steps', 'cosine', 'wsd')
PRECISIONS = ('float32', 'bfloat16')
TRACKERS = ('none', 'wandb', 'trackio')


def require(claim: bool, field: str, value: Any, rule: str, remedy: str) -> None:
  """Raises the one-line ValueError of this project: field, value, rule, remedy."""
  if not claim:
    raise ValueError(f'{field}={value!r} {rule}. {remedy}')


def _positive(obj: Any, prefix: str, *names: str) -> None:
  for name in names:
    value = getattr(obj, name)
    require(value > 0, f'{prefix}.{name}', value, 'must be positive', 'Give a value above 0.')


def _not_negative(obj: Any, prefix: str, *names: str) -> None:
  for name in names:
    value = getattr(obj, name)
    require(value >= 0, f'{prefix}.{name}', value, 'must not be negative', 'Give 0 or more.')


def _one_of(obj: Any, prefix: str, name: str, choices: tuple[str, ...]) -> None:
  value = getattr(obj, name)
  require(
    value in choices,
    f'{prefix}.{name}',
    value,
    f'is not one of {", ".join(choices)}',
    'Choose one of these.',
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Rotary embeddings; YaRN when `yarn_factor` is above 1. Source: arXiv:2309.00071."""

  base: float = 10_000.0
  yarn_factor: float = 1.0
  yarn_original_length: int = 4096  # tokens the model was trained on before the extension
  yarn_beta_fast: float = 32.0
  yarn_beta_slow: float = 1.0
  # softmax scale times (0.1 * this * ln(yarn_factor) + 1)^2
  yarn_mscale_all_dim: float = 1.0

  def __post_init__(self):
    _positive(self, 'model.rope', 'base', 'yarn_original_length', 'yarn_beta_fast')
    require(
      self.yarn_factor >= 1,
      'model.rope.yarn_factor',
      self.yarn_factor,
      'must be at least 1',
      'Use 1 for plain rotary embeddings.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullAttentionConfig:
  """Multi-head attention with half-split rotary embeddings (DeepSeekMoE-16B)."""

  num_heads: int = 4
  d_head: int = 32

  def __post_init__(self):
    _positive(self, 'model.full', 'num_heads', 'd_head')
    require(
      self.d_head % 2 == 0,
      'model.full.d_head',
      self.d_head,
      'must be even: rotary embeddings turn pairs',
      'Add or remove one.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
  """Multi-head latent attention (DeepSeek-V2, V3). Source: arXiv:2405.04434, section 2.1."""

  num_heads: int = 4
  d_nope: int = 32
  d_rope: int = 16
  d_value: int = 32
  kv_rank: int = 64
  q_rank: int = 0  # 0: queries straight from the input, as in V2-Lite

  def __post_init__(self):
    _positive(self, 'model.mla', 'num_heads', 'd_nope', 'd_rope', 'd_value', 'kv_rank')
    _not_negative(self, 'model.mla', 'q_rank')
    require(
      self.d_rope % 2 == 0,
      'model.mla.d_rope',
      self.d_rope,
      'must be even: rotary embeddings turn pairs',
      'Add or remove one.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """Routed and shared experts of one layer (DeepSeekMoE). Source: arXiv:2401.06066, 2412.19437."""

  num_experts: int = 16
  top_k: int = 4
  d_expert: int = 64
  num_shared: int = 1  # shared experts, computed as one feed-forward of this many times d_expert
  score: str = 'sigmoid'
  num_groups: int = 1
  top_groups: int = 1
  group_score: str = 'top2'
  normalize_weights: bool = True
  weight_scale: float = 1.0

  def __post_init__(self):
    _positive(self, 'model.moe', 'num_experts', 'top_k', 'd_expert', 'num_groups', 'top_groups')
    _not_negative(self, 'model.moe', 'num_shared')
    _one_of(self, 'model.moe', 'score', SCORES)
    _one_of(self, 'model.moe', 'group_score', GROUP_SCORES)
    E, K, G, M = self.num_experts, self.top_k, self.num_groups, self.top_groups
    require(
      K <= E,
      'model.moe.top_k',
      K,
      f'must lie in [1, num_experts={E}]: a token cannot visit more experts than exist',
      'Lower top_k or raise num_experts.',
    )
    require(
      E % G == 0,
      'model.moe.num_groups',
      G,
      f'must divide num_experts={E}: groups are of equal size',
      'Choose a divisor.',
    )
    require(
      M <= G,
      'model.moe.top_groups',
      M,
      f'must lie in [1, num_groups={G}]',
      'Lower top_groups.',
    )
    require(
      K <= M * (E // G),
      'model.moe.top_k',
      K,
      f'exceeds the {M * (E // G)} experts in the top_groups={M} groups a token may use',
      'Lower top_k or raise top_groups.',
    )
    require(
      self.group_score != 'top2' or G == 1 or E // G >= 2,
      'model.moe.group_score',
      self.group_score,
      f'needs at least 2 experts in a group, not {E // G}',
      "Use group_score='max' or fewer groups.",
    )


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What one decoder layer is made of; equal neighbours are scanned."""

  attention: str
  feed_forward: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """One definition for the family: a layer is an attention kind and a feed-forward kind."""

  vocab_size: int = 4096
  d_model: int = 128
  num_layers: int = 4
  num_dense_layers: int = 1  # the first layers have a dense feed-forward, the others experts
  d_ff: int = 384  # width of the dense feed-forward
  attention: str = 'mla'
  norm_eps: float = 1e-6
  init_std: float = 0.006
  remat: str = 'none'
  full: FullAttentionConfig = FullAttentionConfig()
  mla: MLAConfig = MLAConfig()
  moe: MoEConfig = MoEConfig()
  rope: RopeConfig = RopeConfig()

  def __post_init__(self):
    _positive(self, 'model', 'vocab_size', 'd_model', 'num_layers', 'd_ff', 'norm_eps', 'init_std')
    _one_of(self, 'model', 'attention', ATTENTION_KINDS)
    _one_of(self, 'model', 'remat', REMAT)
    require(
      0 <= self.num_dense_layers <= self.num_layers,
      'model.num_dense_layers',
      self.num_dense_layers,
      f'must lie in [0, num_layers={self.num_layers}]',
      'Lower it or add layers.',
    )

  @property
  def layers(self) -> tuple[LayerKind, ...]:
    dense = [LayerKind(self.attention, 'dense')] * self.num_dense_layers
    return (*dense, *[LayerKind(self.attention, 'moe')] * (self.num_layers - len(dense)))

  @property
  def num_heads(self) -> int:
    return self.mla.num_heads if self.attention == 'mla' else self.full.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """AdamW and its learning-rate schedule; defaults are DeepSeek-V3's."""

  lr_peak: float = 1e-3
  schedule: str = 'cosine'
  warmup_steps: int = 20
  lr_end_fraction: float = 0.1  # cosine and wsd end at this share of lr_peak
  decay_fraction: float = 0.2  # wsd: share of the steps spent on the final decay
  step_fractions: tuple[float, ...] = (
    0.8,
    0.9,
  )  # steps: where the rate is multiplied by step_factor
  step_factor: float = 0.316
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0

  def __post_init__(self):
    _positive(self, 'optim', 'lr_peak', 'eps', 'clip_norm', 'step_factor')
    _not_negative(self, 'optim', 'warmup_steps', 'weight_decay', 'lr_end_fraction')
    _one_of(self, 'optim', 'schedule', SCHEDULES)
    for name in ('b1', 'b2'):
      value = getattr(self, name)
      require(
        0 <= value < 1, f'optim.{name}', value, 'must lie in [0, 1)', 'It is a decay of averages.'
      )
    require(
      0 < self.decay_fraction <= 1,
      'optim.decay_fraction',
      self.decay_fraction,
      'must lie in (0, 1]',
      'It is a share of the steps.',
    )
    ordered = all(
      a < b for a, b in zip((0, *self.step_fractions), (*self.step_fractions, 1), strict=True)
    )
    require(
      ordered,
      'optim.step_fractions',
      self.step_fractions,
      'must rise strictly within (0, 1)',
      'They are shares of the steps, such as (0.8, 0.9).',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
  """When a step is refused, rolled back, or the run given up."""

  window: int = 64  # accepted samples that the mean and deviation are taken over
  min_samples: int = 16  # before that many, only non-finite values are refused
  sigmas: float = 6.0
  rollback_after: int = 5  # refused steps in a row that cause a return to the last checkpoint
  max_rollbacks: int = 3

  def __post_init__(self):
    _positive(self, 'guard', 'window', 'min_samples', 'sigmas', 'rollback_after')
    _not_negative(self, 'guard', 'max_rollbacks')
    require(
      2 <= self.min_samples <= self.window,
      'guard.min_samples',
      self.min_samples,
      f'must lie in [2, window={self.window}]',
      'Lower it or widen the window.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainConfig:
  """One kind of text in the mixture.

  `source` is `plays` or `code` (installed with the package), `synthetic`, or a path: a .jsonl file with a "text"
  field, a .txt or .md file, or a folder of these.
  """

  source: str
  weight: float = 1.0  # share of tokens, relative to the other domains'
  max_megabytes: float = 0.0  # read at most this much text; 0 reads it all

  def __post_init__(self):
    _positive(self, 'data.domains.*', 'weight')
    _not_negative(self, 'data.domains.*', 'max_megabytes')
    require(bool(self.source), 'data.domains.*.source', self.source, 'is empty', 'Name a source.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The text, its tokenizer, and the shape of a batch."""

  tokenizer: str = (
    'deepseek:4096'  # bytes | deepseek | deepseek:N (its first N ids) | path of a tokenizer.json
  )
  domains: Mapping[str, DomainConfig] = dataclasses.field(
    default_factory=lambda: {'plays': DomainConfig(source='plays')}
  )
  batch_size: int = 16  # sequences a step, over all devices and micro-batches
  sequence_length: int = 256  # tokens a sequence
  validation_fraction: float = 0.05  # share of each domain's documents held out
  cache_dir: str = ''  # tokenized text; empty: under the user's cache folder

  def __post_init__(self):
    _positive(self, 'data', 'batch_size')
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
    _positive(self, 'mesh', 'expert', 'model')
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
    _positive(self, 'checkpoint', 'interval_steps')
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
    _positive(self, 'eval', 'interval_steps', 'batches')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  load_interval_steps: int = (
    10  # how often the load of every expert is written, not only its extremes
  )
  tensorboard: bool = True
  tracker: str = 'none'  # none | wandb | trackio
  project: str = 'moe_jax'

  def __post_init__(self):
    _positive(self, 'log', 'load_interval_steps')
    _one_of(self, 'log', 'tracker', TRACKERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """The text written at the end of a run."""

  prompt: str = 'To be, or not to be'
  num_tokens: int = 100
  temperature: float = 0.8
  top_p: float = 0.95

  def __post_init__(self):
    _not_negative(self, 'sample', 'num_tokens', 'temperature')
    require(
      0 < self.top_p <= 1, 'sample.top_p', self.top_p, 'must lie in (0, 1]', 'Use 1 for no cut.'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """A whole run. `balance` names ideas of moe_jax.routing joined by '+', `routing` holds their fields."""

  seed: int = 0
  steps: int = 100
  microbatches: int = 1  # gradient accumulation: parts that a batch is computed in
  precision: str = 'float32'
  balance: str = 'loss_free+sequence_wise'
  routing: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  model: ModelConfig = ModelConfig()
  optim: OptimConfig = OptimConfig()
  guard: GuardConfig = GuardConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  eval: EvalConfig = EvalConfig()
  log: LogConfig = LogConfig()
  sample: SampleConfig = SampleConfig()

  def __post_init__(self):
    _positive(self, 'config', 'steps', 'microbatches')
    _one_of(self, 'config', 'precision', PRECISIONS)
    require(
      self.data.batch_size % self.microbatches == 0,
      'microbatches',
      self.microbatches,
      f'must divide data.batch_size={self.data.batch_size}',
      'Choose a divisor.',
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
    sizes = {
      'heads': m.num_heads,
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
