"""The model: one definition for the family, as frozen dataclasses that refuse impossible values."""

import dataclasses
from typing import Any

from moe_jax.config.attention import (
  CompressedConfig,
  DSAConfig,
  FullAttentionConfig,
  MLAConfig,
  MoBAConfig,
  NSAConfig,
  RopeConfig,
)
from moe_jax.config.rules import not_negative, one_of, positive, require

COMPRESSED_KINDS = ('sliding', 'csa', 'hca')  # these share the fields of `model.compressed`
ATTENTION_KINDS = ('full', 'mla', 'dsa', 'nsa', 'moba', *COMPRESSED_KINDS)
RESIDUAL_KINDS = ('plain', 'mhc')
SCORES = ('softmax', 'sigmoid', 'sqrt_softplus')
GROUP_SCORES = ('max', 'top2')
# what the backward pass makes again, from nothing to all; see models.decoder
REMAT = ('none', 'light', 'selective', 'dots', 'full')


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPConfig:
  """Multi-token prediction: modules that each look one token further. Source: arXiv:2412.19437."""

  num_modules: int = 0  # 0: none; DeepSeek-V3 has 1
  loss_weight: float = 0.3  # of the mean over modules; V3 goes on with 0.1 after 10T tokens

  def __post_init__(self):
    not_negative(self, 'model.mtp', 'num_modules', 'loss_weight')


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
  # compile every layer by itself: no copies into and out of stacks, and a longer start
  unroll_layers: bool = False
  # of unrolled layers XLA keeps much of what remat leaves to be made again; this forbids it, for
  # less memory and a slower step
  strict_remat: bool = False
  full: FullAttentionConfig = FullAttentionConfig()
  mla: MLAConfig = MLAConfig()
  dsa: DSAConfig = DSAConfig()
  nsa: NSAConfig = NSAConfig()
  moba: MoBAConfig = MoBAConfig()
  compressed: CompressedConfig = CompressedConfig()
  mhc: MHCConfig = MHCConfig()
  moe: MoEConfig = MoEConfig()
  rope: RopeConfig = RopeConfig()
  mtp: MTPConfig = MTPConfig()

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
      not self.strict_remat or self.unroll_layers,
      'model.strict_remat',
      self.strict_remat,
      'is of unrolled layers; in a scan remat is strict already',
      'Set model.unroll_layers=True or leave it out.',
    )
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

  def attention_config(self, kind: str) -> Any:
    """The fields of an attention kind."""
    return getattr(self, 'compressed' if kind in COMPRESSED_KINDS else kind)
