"""Checkpoints in FP8: one scale for each block of a matrix, multiplied back on reading.

`X` of dtype F8_E4M3 comes with `X_scale_inv`, or with `.scale` in place of its `.weight`: float32,
bfloat16, or UE8M0 (a power of two in one byte), of shape [..., ceil(rows / b), ceil(columns / b)].

Source: arXiv:2412.19437, section 3.3; deepseek-ai/DeepSeek-V3, inference/fp8_cast_bf16.py.
"""

import ml_dtypes
import numpy as np

from moe_jax.interop.safetensors import Tensor

FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
SCALES = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu)))


def scale_of(name: str, tensors: dict[str, Tensor]) -> str:
  """The name that the scale of an FP8 tensor has, or should have."""
  short = name.removesuffix('.weight') + '.scale'
  return short if short in tensors else f'{name}_scale_inv'


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
  """Blocks at the ragged edge have a scale too."""
  return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def dequantize(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
  """float32 [..., rows, columns]: every value times the scale of its block."""
  values = np.arange(256, dtype=np.uint8).view(weight.dtype).astype(np.float32)
  out = values[weight.view(np.uint8)]
  rows, columns = out.shape[-2:]
  wide = np.repeat(scale.astype(np.float32), block[1], axis=-1)[..., :columns]
  for i in range(scale.shape[-2]):  # a row of blocks at a time keeps the scales small
    out[..., i * block[0] : min((i + 1) * block[0], rows), :] *= wide[..., i : i + 1, :]
  return out
