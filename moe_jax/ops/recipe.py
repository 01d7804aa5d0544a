"""How the three products of a linear map are computed: what their operands are rounded to."""

from typing import NamedTuple

from moe_jax.ops.quantize import Format

FP8 = {'e4m3': 'float8_e4m3fn', 'e5m2': 'float8_e5m2'}
DTYPES = ('float32', 'bfloat16', *FP8)
SCALINGS = ('none', 'tensor', 'block')


class Product(NamedTuple):
  """One product. Sums are float32 whatever the operands.

  Scales are taken from the operand itself. `tensor`: one. `block`: one for each 128 values along
  the contracted dimension of activations and gradients, and for each 128 x 128 of a weight.
  """

  first: str  # of activations; of the gradient of the output in dgrad
  second: str  # of weights; of the gradient of the output in wgrad
  scaling: str = 'none'
  power_of_two: bool = False  # scales rounded up to one

  @property
  def is_fp8(self) -> bool:
    return self.first in FP8

  def formats(self) -> tuple[Format, Format]:
    first, second = (
      Format(dtype=FP8[name], power_of_two=self.power_of_two) for name in (self.first, self.second)
    )
    return first, second


class Recipe(NamedTuple):
  """forward: x w; dgrad: dy w^T; wgrad: x^T dy."""

  forward: Product
  dgrad: Product
  wgrad: Product

  @property
  def is_fp8(self) -> bool:
    return any(product.is_fp8 for product in self)


def uniform(dtype: str) -> Recipe:
  """All products in one unscaled dtype."""
  return Recipe(*(Product(dtype, dtype),) * 3)
