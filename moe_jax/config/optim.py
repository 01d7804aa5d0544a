"""The optimizer, its schedule, and the guard before it."""

import dataclasses
import re

from moe_jax.config.rules import not_negative, one_of, positive, require

OPTIMIZERS = ('adamw', 'muon')
SCHEDULES = ('constant', 'steps', 'cosine', 'wsd')
MOMENT_DTYPES = ('float32', 'bfloat16')
ROUNDINGS = ('stochastic', 'nearest')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonConfig:
  """What Muon adds to the fields of `optim`, read with optim.name='muon'; defaults are V4's."""

  momentum: float = 0.95
  update_rms: float = 0.18  # root mean square of a matrix's update, times the learning rate
  dtype: str = 'float32'  # that Newton-Schulz multiplies in
  adamw_eps: float = 1e-20  # instead of optim.eps, for what AdamW keeps

  def __post_init__(self):
    positive(self, 'optim.muon', 'update_rms', 'adamw_eps')
    one_of(self, 'optim.muon', 'dtype', ('float32', 'bfloat16'))
    require(
      0 <= self.momentum < 1,
      'optim.muon.momentum',
      self.momentum,
      'must lie in [0, 1)',
      'It is a decay of averages.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """The optimizer and its learning-rate schedule; defaults are DeepSeek-V3's."""

  name: str = 'adamw'  # or muon: Muon for matrices, AdamW for the rest
  lr_peak: float = 1e-3
  schedule: str = 'cosine'
  warmup_steps: int = 20
  lr_end_fraction: float = 0.1  # cosine and wsd end at this share of lr_peak
  decay_fraction: float = 0.2  # wsd: share of the steps spent on the final decay
  # schedule 'steps': where in the run the rate is multiplied by step_factor
  step_fractions: tuple[float, ...] = (0.8, 0.9)
  step_factor: float = 0.316
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  moments_dtype: str = 'float32'  # of AdamW's moments between steps; bfloat16 halves them
  moments_rounding: str = 'stochastic'  # or nearest; of moments in bfloat16
  muon: MuonConfig = MuonConfig()
  # regular expression: what is trained has it in its path, such as 'indexer'; empty trains all
  trainable: str = ''

  def __post_init__(self):
    one_of(self, 'optim', 'name', OPTIMIZERS)
    positive(self, 'optim', 'lr_peak', 'eps', 'clip_norm', 'step_factor')
    not_negative(self, 'optim', 'warmup_steps', 'weight_decay', 'lr_end_fraction')
    one_of(self, 'optim', 'schedule', SCHEDULES)
    one_of(self, 'optim', 'moments_dtype', MOMENT_DTYPES)
    one_of(self, 'optim', 'moments_rounding', ROUNDINGS)
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
    try:
      re.compile(self.trainable)
    except re.error as error:
      rule = f'is no regular expression: {error}'
      require(False, 'optim.trainable', self.trainable, rule, "Write a pattern such as 'indexer'.")
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
    positive(self, 'guard', 'window', 'min_samples', 'sigmas', 'rollback_after')
    not_negative(self, 'guard', 'max_rollbacks')
    require(
      2 <= self.min_samples <= self.window,
      'guard.min_samples',
      self.min_samples,
      f'must lie in [2, window={self.window}]',
      'Lower it or widen the window.',
    )
