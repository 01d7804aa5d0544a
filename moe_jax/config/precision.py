"""Which dtype policy a run uses, and the lines of its table that a config overrides."""

import dataclasses

from moe_jax.config.rules import require

PRECISIONS = ('float32', 'bfloat16', 'fp8_tensor', 'fp8_block')
FP8_BLOCK = 128
FP8_DTYPES = ('e4m3', 'e5m2')
# what a line may be overridden with, word by word
PRODUCT_WORDS = ('float32', 'bfloat16', *FP8_DTYPES, 'tensor', 'block', 'power_of_two')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionOverrides:
  """Lines of the policy's table in moe_jax.precision, as words: 'e5m2', 'bfloat16', 'e4m3 tensor'.

  A dtype word sets the operands (e5m2 only those that are gradients), tensor or block the scaling,
  power_of_two rounds scales up to one. Empty keeps the policy's line.
  """

  linear_forward: str = ''
  linear_dgrad: str = ''
  linear_wgrad: str = ''
  experts_forward: str = ''
  experts_dgrad: str = ''
  experts_wgrad: str = ''
  # e4m3 or e5m2: tokens on their way to other devices, and gradients of what those send back, are
  # quantised 128 values at a time (arXiv:2412.19437, 3.3.3)
  dispatch: str = ''
  gradients: str = ''  # bfloat16 or float32: what a step's products of weights' gradients give

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name, value = f'precision_overrides.{field.name}', getattr(self, field.name)
      words = ('float32', 'bfloat16') if field.name == 'gradients' else PRODUCT_WORDS
      if field.name.startswith('experts') or field.name == 'dispatch':
        words = tuple(word for word in words if word != 'tensor')  # experts have scales by block
      for word in value.split():
        require(
          word in words,
          name,
          value,
          f'has {word!r}, which is not one of {", ".join(words)}',
          'Use these words, or leave the line empty.',
        )
      dtypes = [word for word in value.split() if word in ('float32', 'bfloat16', *FP8_DTYPES)]
      require(len(dtypes) <= 1, name, value, 'names several dtypes', 'Name one.')
