"""Rotary position embeddings, both pair layouts of the family, with YaRN.

MLA turns adjacent pairs (2i, 2i+1), V4 those of a head's last channels; DeepSeekMoE-16B turns
half-split pairs (i, i + C/2).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# B batch  S sequence  H heads  C rotated channels


def frequencies(
  channels: int,
  *,
  base: float,
  yarn_factor: float = 1.0,
  yarn_original_length: int = 4096,
  yarn_beta_fast: float = 32.0,
  yarn_beta_slow: float = 1.0,
) -> np.ndarray:
  """Radians a position for every pair, float32 [C/2].

  With `yarn_factor` > 1, pairs that turn less than `beta_slow` times within the original length are
  slowed by the factor, those above `beta_fast` keep their speed, and a ramp joins them.

  Source: arXiv:2309.00071, section 3.2.
  """
  freq = base ** -(np.arange(0, channels, 2, dtype=np.float64) / channels)
  if yarn_factor == 1:
    return freq.astype(np.float32)

  def pair_of(turns: float) -> float:
    return channels * math.log(yarn_original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

  low = max(math.floor(pair_of(yarn_beta_fast)), 0)
  high = min(math.ceil(pair_of(yarn_beta_slow)), channels - 1)
  width = high - low or 0.001
  ramp = np.clip((np.arange(channels // 2) - low) / width, 0, 1)
  return (freq * (1 - ramp) + freq / yarn_factor * ramp).astype(np.float32)


def yarn_softmax_factor(yarn_factor: float, mscale_all_dim: float) -> float:
  """What the softmax scale is multiplied by under YaRN: (0.1 m ln(factor) + 1)^2."""
  if yarn_factor == 1:
    return 1.0
  return (0.1 * mscale_all_dim * math.log(yarn_factor) + 1) ** 2


def _angles(position_BS: Int[Array, 'B S'], freq: np.ndarray) -> tuple[Array, Array]:
  angle_BS1P = position_BS[..., None, None].astype(jnp.float32) * freq
  return jnp.cos(angle_BS1P), jnp.sin(angle_BS1P)


def rotate_adjacent(
  x_BSHC: Float[Array, 'B S H C'], position_BS: Int[Array, 'B S'], freq: np.ndarray
) -> Float[Array, 'B S H C']:
  """Turns pairs (2i, 2i+1) by position * freq[i]; float32 inside, x's dtype out."""
  cos, sin = _angles(position_BS, freq)
  x = x_BSHC.astype(jnp.float32)
  even, odd = x[..., 0::2], x[..., 1::2]
  turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
  return turned.reshape(x.shape).astype(x_BSHC.dtype)


def rotate_half_split(
  x_BSHC: Float[Array, 'B S H C'], position_BS: Int[Array, 'B S'], freq: np.ndarray
) -> Float[Array, 'B S H C']:
  """Turns pairs (i, i + C/2) by position * freq[i]; float32 inside, x's dtype out."""
  cos, sin = _angles(position_BS, freq)
  low, high = jnp.split(x_BSHC.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
  return turned.astype(x_BSHC.dtype)


def rotate_last(
  x_BSHC: Float[Array, 'B S H C'], position_BS: Int[Array, 'B S'], freq: np.ndarray
) -> Float[Array, 'B S H C']:
  """`rotate_adjacent` on the last 2 * len(freq) channels; negative positions turn back."""
  still, turned = jnp.split(x_BSHC, [x_BSHC.shape[-1] - 2 * len(freq)], axis=-1)
  return jnp.concatenate([still, rotate_adjacent(turned, position_BS, freq)], axis=-1)
