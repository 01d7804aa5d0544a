"""The attention kinds: what each may be told, as frozen dataclasses."""

import dataclasses
from typing import ClassVar

from moe_jax.config.rules import not_negative, one_of, positive, require

INDEXER_STAGES = ('dense_warmup', 'sparse')


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
