"""Products of FP8 operands: per-tensor scales through XLA's cuBLASLt, block scales through our
grouped kernel with one group; simulated elsewhere.

Simulated products quantise with the same code and multiply the dequantised numbers in float32, so
they differ from native ones only in the order of sums. cuBLASLt wants both operands contiguous
along the contracted dimension; so do the tensor cores, and our kernel.
"""

import jax
import jax.numpy as jnp

from moe_jax.ops import quantize
from moe_jax.ops.grouped_matmul import mosaic_gpu
from moe_jax.ops.quantize import TILE, Quantized
from moe_jax.ops.recipe import Product, Recipe

# T tokens  K contracted  N out

IMPLEMENTATIONS = ('simulated', 'native')


def choose(recipe: Recipe, implementation: str | None) -> str:
  """The implementation of a recipe's FP8 products on this device."""
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'implementation={implementation!r} is not one of {", ".join(IMPLEMENTATIONS)}.'
    )
  reason = _refusal(recipe)
  if implementation == 'native' and reason:
    raise NotImplementedError(f'linear, native: {reason}.')
  return implementation or ('simulated' if reason else 'native')


def _refusal(recipe: Recipe) -> str | None:
  if not mosaic_gpu.on_hopper():
    return f'FP8 products need a Hopper GPU, this is {jax.devices()[0].device_kind}'
  if any(product.is_fp8 and product.scaling == 'block' for product in recipe):
    return 'block scales have no kernel here yet'
  return None


def matmul(
  x_TK: jax.Array, w: jax.Array, product: Product, implementation: str, *, transpose_w: bool
) -> jax.Array:
  """x w for w [K, N], x w^T for w [N, K], with `transpose_w`."""
  first, second = product.formats()
  N = w.shape[0 if transpose_w else 1]
  if product.scaling == 'tensor':
    x8, w8 = quantize.quantize_tensor(x_TK, first), quantize.quantize_tensor(w, second)
    w8_NK = w8 if transpose_w else Quantized(w8.values.T, w8.scale)
    # rounded before it is scaled: cuBLASLt then writes 16 bits, and the scaling joins what follows
    return _tensor_product(x8, w8_NK, implementation, x_TK.dtype)
  x8 = quantize.quantize_rows(_pad(x_TK, (1, TILE)), first)
  w8 = quantize.quantize_blocks(_pad(w, (TILE, TILE)), second)
  w8_NK = w8 if transpose_w else quantize.transpose_blocks(w8)
  if implementation == 'simulated':
    y = _float32_product(quantize.dequantize_rows(x8), quantize.dequantize_blocks(w8_NK))
  else:
    y = _kernel_rows(x8, w8_NK, x_TK.dtype)
  return y[:, :N]


def columns(x_TK: jax.Array, product: Product, *, side: int) -> Quantized:
  """x quantised along T, transposed: [K, T], the first (side 0) or second operand of wgrad."""
  fmt = product.formats()[side]
  if product.scaling == 'tensor':
    x = quantize.quantize_tensor(x_TK, fmt)
    return Quantized(x.values.T, x.scale)
  return quantize.quantize_columns(_pad(x_TK, (TILE, 1)), fmt)


def weight_grad(
  x_KT: Quantized, dy_NT: Quantized, product: Product, implementation: str
) -> jax.Array:
  """x^T dy, [K, N], of the `columns` of both."""
  if product.scaling == 'tensor':
    return _tensor_product(x_KT, dy_NT, implementation, jnp.float32)
  if implementation == 'simulated':
    return _float32_product(quantize.dequantize_rows(x_KT), quantize.dequantize_rows(dy_NT))
  return _kernel_columns(x_KT, dy_NT)


def _tensor_product(
  a_MK: Quantized, b_NK: Quantized, implementation: str, dtype: jax.typing.DTypeLike
) -> jax.Array:
  if implementation == 'simulated':
    a, b = (q.values.astype(jnp.float32) for q in (a_MK, b_NK))
    y_MN = _float32_product(a, b).astype(dtype)
  else:
    y_MN = jnp.einsum('mk,nk->mn', a_MK.values, b_NK.values, preferred_element_type=dtype)
  return y_MN.astype(jnp.float32) * (a_MK.scale * b_NK.scale)


def _float32_product(a_MK: jax.Array, b_NK: jax.Array) -> jax.Array:
  return jnp.einsum('mk,nk->mn', a_MK, b_NK, precision='highest')


def _pad(a: jax.Array, multiples: tuple[int, int]) -> jax.Array:
  """Zeros behind, up to multiples of these; they change no scale and no sum."""
  missing = [(0, -n % m) for n, m in zip(a.shape, multiples, strict=True)]
  return jnp.pad(a, missing) if any(m for _, m in missing) else a


def _kernel_rows(x_TK: Quantized, w_NK: Quantized, dtype: jax.typing.DTypeLike) -> jax.Array:
  raise NotImplementedError


def _kernel_columns(x_KT: Quantized, dy_NT: Quantized) -> jax.Array:
  raise NotImplementedError
