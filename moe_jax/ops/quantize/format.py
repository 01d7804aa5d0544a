"""What a quantised array is, and how a scale follows from the largest value under it.

Everything here is integer arithmetic and single multiplications, so a CPU, XLA on a GPU and our
kernels get the same bits: GPU compilers divide floats to within two units only.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TILE = 128


class Quantized(NamedTuple):
  """Low-precision values with their scales: the number meant is value * scale.

  | what | values | scale |
  | --- | --- | --- |
  | rows, 1x128 tiles | [R, K] | [K/128, R] |
  | columns, 128x1 tiles: the rows of the transpose | [K, R] | [R/128, K] |
  | blocks, 128x128 | [..., D, F] | [..., D/128, F/128] |
  | tensor | any | [] |

  A row's scales lie apart so that a kernel fetches 128 rows of one step of K as one line.
  """

  values: jax.Array
  scale: jax.Array  # float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """How to quantise.

  With power_of_two a scale is rounded up to a power of two, so that scaling is exact. floor is the
  least value a tile's largest is taken for: 1e-4 in DeepSeek's published code; the default merely
  gives a tile of zeros a finite scale.
  """

  dtype: str = 'float8_e4m3fn'
  power_of_two: bool = False
  floor: float = 2.0**-100

  def __post_init__(self):
    if self.dtype not in _MAX_EXPONENT:
      raise ValueError(f'dtype={self.dtype!r} is not one of {", ".join(_MAX_EXPONENT)}.')
    if not 2.0**-100 <= self.floor < 1:
      raise ValueError(f'floor={self.floor} must lie in [2**-100, 1): scales are float32.')

  @property
  def max_exponent(self) -> int:
    """The largest value is 1.75 * 2**max_exponent."""
    return _MAX_EXPONENT[self.dtype]


# 448 and 57344
_MAX_EXPONENT = {'float8_e4m3fn': 8, 'float8_e5m2': 15}


def magnitude(x: jax.Array) -> jax.Array:
  """The bits of |x| in float32. They order as the numbers do, infinity and then NaN last, so their
  maximum never loses a NaN, as the maximum of floats does on some devices."""
  return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF


def scale_and_inverse(largest: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
  """Scale of a tile with this largest `magnitude`, and the factor that quantises: value * inverse.

  The largest is rounded up to 8 significant bits first (bfloat16 values have no more), which makes
  the inverse a division of small integers: q / 2**28 = 7 / mantissa, rounded down, so that no value
  leaves the format's range. The scale of a tile with an infinity or NaN is not finite.
  """
  # the upper bound keeps a NaN, and keeps the sums below from wrapping around
  bits = jnp.clip(largest, _bits(fmt.floor), 0x7FC00000)
  if fmt.power_of_two:
    # the mantissa of 1.75 fits exactly; a larger one needs the next power
    exponent = (bits >> 23) - fmt.max_exponent + ((bits & 0x7FFFFF) > 0x600000)
    scale = jnp.where(bits < 0x7F800000, _power(exponent), jnp.float32(jnp.nan))
    return scale, _power(254 - exponent)
  bits = (bits + 0xFFFF) & ~0xFFFF
  mantissa = ((bits >> 16) & 0x7F) | 0x80
  q = jax.lax.div(jnp.full_like(mantissa, 7 << 28), mantissa)
  inverse = q.astype(jnp.float32) * _power(231 + fmt.max_exponent - (bits >> 23))
  one_part = jnp.float32(1 / (1.75 * 2.0**fmt.max_exponent))
  return jax.lax.bitcast_convert_type(bits, jnp.float32) * one_part, inverse


def _bits(x: float) -> int:
  return int(np.float32(x).view(np.int32))


def _power(biased_exponent: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(biased_exponent << 23, jnp.float32)
