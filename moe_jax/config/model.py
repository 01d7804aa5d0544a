"""The model: one definition for the family, as frozen dataclasses that refuse impossible values."""

import dataclasses

from moe_jax.config.rules import not_negative, one_of, positive, require

COMPRESSED_KINDS = ('sliding', 'csa', 'hca')  # these share the fields of `model.compressed`
ATTENTION_KINDS = ('full', 'mla', *COMPRESSED_KINDS)
RESIDUAL_KINDS = ('plain', 'mhc')
INDEXER_STAGES = ('dense_warmup', 'sparse')
SCORES = ('softmax', 'sigmoid', 'sqrt_softplus')
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

  def __post_init__(self):
    positive(self, 'model.mla', 'num_heads', 'd_nope', 'd_rope', 'd_value', 'kv_rank')
    not_negative(self, 'model.mla', 'q_rank')
    require(
      self.d_rope % 2 == 0,
      'model.mla.d_rope',
      self.d_rope,
      'must be even: rotary embeddings turn pairs',
      'Add or remove one.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedConfig:
  """DeepSeek-V4's attention: a window of tokens, and compressed entries for what lies behind it.

  Kind `sliding` is the window alone; `csa` adds the entries that an indexer selects, `hca` adds all
  of its own, coarser ones. Source: arXiv:2606.19348, section 2.2.
  """

  num_heads: int = 4
  d_head: int = 32  # of the one key, which is the value too
  d_rope: int = 8  # the last channels of each head
  q_rank: int = 24
  window: int = 128  # tokens, the query's own included
  num_groups: int = 2  # groups of heads in the output projection
  group_rank: int = 16
  csa_ratio: int = 4  # tokens an entry
  hca_ratio: int = 128
  num_index_heads: int = 8
  d_index: int = 16
  index_top_k: int = 512  # entries that a query of `csa` sees
  stage: str = 'sparse'  # dense_warmup: csa sees all entries, and the indexer learns on all
  index_loss_weight: float = 1.0  # 0: the indexer does not learn
  # of csa and hca; sliding layers use model.rope
  rope: RopeConfig = RopeConfig(base=160_000.0, yarn_factor=16.0, yarn_original_length=65_536)

  def __post_init__(self):
    name = 'model.compressed'
    positive(self, name, 'num_heads', 'd_head', 'd_rope', 'q_rank', 'window', 'num_groups')
    positive(self, name, 'group_rank', 'csa_ratio', 'hca_ratio', 'num_index_heads', 'd_index')
    positive(self, name, 'index_top_k')
    not_negative(self, name, 'index_loss_weight')
    one_of(self, name, 'stage', INDEXER_STAGES)
    require(
      self.d_rope % 2 == 0 and self.d_rope <= min(self.d_head, self.d_index),
      f'{name}.d_rope',
      self.d_rope,
      f'must be even and at most d_head={self.d_head} and d_index={self.d_index}',
      'Rotary embeddings turn pairs of the last channels: lower it.',
    )
    require(
      self.num_heads % self.num_groups == 0,
      f'{name}.num_groups',
      self.num_groups,
      f'must divide num_heads={self.num_heads}: groups are of equal size',
      'Choose a divisor.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MHCConfig:
  """Manifold-constrained hyper-connections: several residual streams, mixed at every site.

  Source: arXiv:2606.19348, section 2.1.
  """

  num_streams: int = 4
  sinkhorn_iterations: int = 20
  eps: float = 1e-6
  init_scale: float = 0.01  # of what the streams themselves contribute to the mixing

  def __post_init__(self):
    positive(self, 'model.mhc', 'num_streams', 'sinkhorn_iterations', 'eps')
    not_negative(self, 'model.mhc', 'init_scale')


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
  num_hash_layers: int = 0  # the first layers with experts choose them by token id, from a table
  swiglu_limit: float = 0.0  # clamp of every expert's gate and up values; 0: none

  def __post_init__(self):
    positive(self, 'model.moe', 'num_experts', 'top_k', 'd_expert', 'num_groups', 'top_groups')
    not_negative(self, 'model.moe', 'num_shared', 'num_hash_layers', 'swiglu_limit')
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
  feed_forward: str  # dense | moe | moe_hash


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
  residual: str = 'plain'
  norm_eps: float = 1e-6
  init_std: float = 0.006
  remat: str = 'none'
  full: FullAttentionConfig = FullAttentionConfig()
  mla: MLAConfig = MLAConfig()
  compressed: CompressedConfig = CompressedConfig()
  mhc: MHCConfig = MHCConfig()
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
    one_of(self, 'model', 'residual', RESIDUAL_KINDS)
    one_of(self, 'model', 'remat', REMAT)
    require(
      0 <= self.num_dense_layers <= self.num_layers,
      'model.num_dense_layers',
      self.num_dense_layers,
      f'must lie in [0, num_layers={self.num_layers}]',
      'Lower it or add layers.',
    )
    require(
      self.num_dense_layers + self.moe.num_hash_layers <= self.num_layers,
      'model.moe.num_hash_layers',
      self.moe.num_hash_layers,
      f'exceeds the layers with experts: num_layers={self.num_layers} less '
      f'num_dense_layers={self.num_dense_layers}',
      'Lower it.',
    )

  @property
  def layers(self) -> tuple[LayerKind, ...]:
    attention = self.attention_per_layer or (self.attention,) * self.num_layers
    num_hash = self.num_dense_layers + self.moe.num_hash_layers
    return tuple(
      LayerKind(
        kind,
        'dense' if i < self.num_dense_layers else 'moe_hash' if i < num_hash else 'moe',
      )
      for i, kind in enumerate(attention)
    )

  def attention_config(self, kind: str) -> FullAttentionConfig | MLAConfig | CompressedConfig:
    """The fields of an attention kind."""
    return getattr(self, 'compressed' if kind in COMPRESSED_KINDS else kind)
