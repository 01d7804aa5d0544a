"""The model: one definition for the family, as frozen dataclasses that refuse impossible values."""

import dataclasses
from typing import ClassVar

from moe_jax.config.rules import not_negative, one_of, positive, require

ATTENTION_KINDS = ('full', 'mla', 'dsa', 'nsa', 'moba')
INDEXER_STAGES = ('dense_warmup', 'sparse')
SCORES = ('softmax', 'sigmoid')
GROUP_SCORES = ('max', 'top2')
REMAT = ('none', 'full', 'dots')


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
  yarn_magnitude: float = 1.0  # cos and sin times this; 1 in every released model

  def __post_init__(self):
    positive(self, 'model.rope', 'base', 'yarn_original_length', 'yarn_beta_fast', 'yarn_magnitude')
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
    positive(self, 'model.full', 'num_heads', 'd_head')
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

  group: ClassVar[str] = 'model.mla'

  def __post_init__(self):
    positive(self, self.group, 'num_heads', 'd_nope', 'd_rope', 'd_value', 'kv_rank')
    not_negative(self, self.group, 'q_rank')
    require(
      self.d_rope % 2 == 0,
      f'{self.group}.d_rope',
      self.d_rope,
      'must be even: rotary embeddings turn pairs',
      'Add or remove one.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSAConfig(MLAConfig):
  """MLA over the keys that a lightning indexer picks (DeepSeek-V3.2). Source: arXiv:2512.02556.

  `stage` says how the indexer is trained and whether its choice is used: `dense_warmup` attends to
  every key and fits the indexer to that attention (train it alone: optim.trainable='indexer');
  `sparse` attends to the chosen keys and fits the indexer on these.
  """

  num_index_heads: int = 8
  d_index: int = 32  # the first d_rope channels are rotated
  index_top_k: int = 64  # keys a query attends to
  stage: str = 'sparse'
  index_loss_weight: float = 1.0  # 0: the indexer does not learn

  group: ClassVar[str] = 'model.dsa'

  def __post_init__(self):
    super().__post_init__()
    positive(self, self.group, 'num_index_heads', 'd_index', 'index_top_k')
    not_negative(self, self.group, 'index_loss_weight')
    one_of(self, self.group, 'stage', INDEXER_STAGES)
    require(
      self.d_rope <= self.d_index,
      'model.dsa.d_index',
      self.d_index,
      f'is below d_rope={self.d_rope}: the indexer rotates its first d_rope channels',
      'Raise d_index.',
    )


def _grouped_heads(cfg: 'NSAConfig | MoBAConfig', group: str) -> None:
  positive(cfg, group, 'num_heads', 'num_kv_heads', 'd_head', 'd_value')
  require(
    cfg.num_heads % cfg.num_kv_heads == 0,
    f'{group}.num_kv_heads',
    cfg.num_kv_heads,
    f'must divide num_heads={cfg.num_heads}: as many query heads share each',
    'Choose a divisor.',
  )
  require(
    cfg.d_head % 2 == 0,
    f'{group}.d_head',
    cfg.d_head,
    'must be even: rotary embeddings turn pairs',
    'Add or remove one.',
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSAConfig:
  """Native sparse attention; lengths in tokens. Source: arXiv:2502.11089, section 3."""

  num_heads: int = 4
  num_kv_heads: int = 2
  d_head: int = 32  # of queries and keys
  d_value: int = 32
  compress_length: int = 32  # tokens that become one compressed key
  compress_stride: int = 16  # from one compressed block to the next
  d_compress: int = 32  # hidden width of the compressing network
  select_length: int = 64  # tokens of a block that is chosen or not
  top_blocks: int = 16  # chosen blocks, the first and the two nearest among them
  window: int = 512

  def __post_init__(self):
    _grouped_heads(self, 'model.nsa')
    positive(self, 'model.nsa', 'compress_length', 'compress_stride', 'd_compress')
    positive(self, 'model.nsa', 'select_length', 'window')
    for name in ('compress_length', 'select_length'):
      require(
        getattr(self, name) % self.compress_stride == 0,
        f'model.nsa.{name}',
        getattr(self, name),
        f'must be a multiple of compress_stride={self.compress_stride}',
        'Change one of them.',
      )
    require(
      self.top_blocks >= 3,
      'model.nsa.top_blocks',
      self.top_blocks,
      'must be at least 3: the first block and the two nearest are always chosen',
      'Raise it.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoBAConfig:
  """Mixture of block attention. Source: arXiv:2502.13189, section 2.2."""

  num_heads: int = 4
  num_kv_heads: int = 2
  d_head: int = 32  # of queries and keys
  d_value: int = 32
  block_size: int = 64  # tokens
  top_k: int = 3  # blocks that a query attends to besides its own

  def __post_init__(self):
    _grouped_heads(self, 'model.moba')
    positive(self, 'model.moba', 'block_size', 'top_k')


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
    positive(self, 'model.moe', 'num_experts', 'top_k', 'd_expert', 'num_groups', 'top_groups')
    not_negative(self, 'model.moe', 'num_shared')
    one_of(self, 'model.moe', 'score', SCORES)
    one_of(self, 'model.moe', 'group_score', GROUP_SCORES)
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
  attention: str = 'mla'  # of every layer
  attention_per_layer: tuple[str, ...] = ()  # or of each, in order
  norm_eps: float = 1e-6
  init_std: float = 0.006
  remat: str = 'none'
  full: FullAttentionConfig = FullAttentionConfig()
  mla: MLAConfig = MLAConfig()
  dsa: DSAConfig = DSAConfig()
  nsa: NSAConfig = NSAConfig()
  moba: MoBAConfig = MoBAConfig()
  moe: MoEConfig = MoEConfig()
  rope: RopeConfig = RopeConfig()

  def __post_init__(self):
    positive(self, 'model', 'vocab_size', 'd_model', 'num_layers', 'd_ff', 'norm_eps', 'init_std')
    one_of(self, 'model', 'attention', ATTENTION_KINDS)
    for kind in self.attention_per_layer:
      require(
        kind in ATTENTION_KINDS,
        'model.attention_per_layer',
        kind,
        f'is not one of {", ".join(ATTENTION_KINDS)}',
        'Choose one of these for each layer.',
      )
    require(
      len(self.attention_per_layer) in (0, self.num_layers),
      'model.attention_per_layer',
      self.attention_per_layer,
      f'must name one kind for each of num_layers={self.num_layers} layers, or be empty',
      'Leave it empty to use model.attention everywhere.',
    )
    one_of(self, 'model', 'remat', REMAT)
    require(
      0 <= self.num_dense_layers <= self.num_layers,
      'model.num_dense_layers',
      self.num_dense_layers,
      f'must lie in [0, num_layers={self.num_layers}]',
      'Lower it or add layers.',
    )

  @property
  def layers(self) -> tuple[LayerKind, ...]:
    attention = self.attention_per_layer or (self.attention,) * self.num_layers
    return tuple(
      LayerKind(kind, 'dense' if i < self.num_dense_layers else 'moe')
      for i, kind in enumerate(attention)
    )
