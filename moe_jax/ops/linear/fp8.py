"""Products of FP8 operands: per-tensor scales through XLA's cuBLASLt, block scales through our
grouped kernel with one group; simulated elsewhere.

Simulated products quantise with the same code and multiply the dequantised numbers in float32, so
they differ from native ones only in the order of sums. cuBLASLt wants both operands contiguous
along the contracted dimension; so do the tensor cores, and our kernel.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops import quantize
from moe_jax.ops.grouped_matmul import mosaic_gpu
from moe_jax.ops.grouped_matmul.fp8 import grouped_matmul_fp8, weight_grad_fp8
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
  return None


class Weights(NamedTuple):
  """A matrix as products read it, each None where its product is not FP8."""

  forward: Quantized | None  # w^T, [..., N, K]
  dgrad: Quantized | None  # w, [..., K, N]


def quantize_weights(
  w_KN: jax.Array, recipe: Recipe, *, via: jax.typing.DTypeLike | None = None
) -> Weights:
  """Both copies of a matrix, or of each of [..., K, N], from one reading where they are alike.

  Args:
    via: what w is rounded to before.
  """
  forward, dgrad = (product.is_fp8 for product in recipe[:2])
  kinds = {(p.scaling, p.formats()[1]) for p in recipe[:2] if p.is_fp8}
  found = {kind: _both(w_KN, *kind, via) for kind in kinds}
  of = lambda product: found[product.scaling, product.formats()[1]]
  return Weights(of(recipe.forward)[1] if forward else None, of(recipe.dgrad)[0] if dgrad else None)


def _both(w_KN: jax.Array, scaling: str, fmt: quantize.Format, via: Any) -> tuple[Quantized, ...]:
  if scaling == 'block':
    sides = (*(1,) * (w_KN.ndim - 2), TILE, TILE)
    return quantize.quantize_blocks_and_transposed(_pad(w_KN, sides), fmt, via=via)
  w_KN = quantize.through(w_KN, via)
  lead = w_KN.shape[:-2]
  each = jax.vmap(lambda w: quantize.quantize_tensor(w, fmt))(w_KN.reshape(-1, *w_KN.shape[-2:]))
  plain = Quantized(each.values.reshape(w_KN.shape), each.scale.reshape(lead))
  return plain, Quantized(jnp.swapaxes(plain.values, -1, -2), plain.scale)


def operands(
  x_TK: jax.Array, along_K: Product | None, along_T: Product | None, *, side: int = 0
) -> tuple[Quantized | None, Quantized | None]:
  """x for a product that contracts along K, [T, K], and for one along T, transposed: [K, T].

  Each is None where its product is not FP8. Both are made of one reading of x where they can be.

  Args:
    side: which operand of `along_T` this is.
  """
  rows = along_K.formats()[0] if along_K and along_K.is_fp8 else None
  columns = along_T.formats()[side] if along_T and along_T.is_fp8 else None
  tensor = lambda product: product is not None and product.scaling == 'tensor'
  if tensor(along_K) or tensor(along_T):
    row = columns_T = None
    if rows:
      row = quantize.quantize_tensor(x_TK, rows) if tensor(along_K) else _rows(x_TK, rows)
    if columns and tensor(along_T):
      whole = row if row and tensor(along_K) and rows == columns else None
      whole = whole or quantize.quantize_tensor(x_TK, columns)
      columns_T = Quantized(whole.values.T, whole.scale)
    elif columns:
      columns_T = quantize.quantize_columns(_pad(x_TK, (TILE, TILE)), columns)
    return row, columns_T
  if rows and rows == columns:
    return quantize.quantize_rows_and_columns(_pad(x_TK, (TILE, TILE)), rows)
  return (
    _rows(x_TK, rows) if rows else None,
    quantize.quantize_columns(_pad(x_TK, (TILE, TILE)), columns) if columns else None,
  )


def _rows(x_TK: jax.Array, fmt: quantize.Format) -> Quantized:
  return quantize.quantize_rows(_pad(x_TK, (TILE, TILE)), fmt)


def matmul(
  x: Quantized,
  w: jax.Array,
  product: Product,
  implementation: str,
  *,
  w8: Quantized | None = None,
  transpose_w: bool,
  num_rows: int,
  dtype: jnp.dtype,
) -> jax.Array:
  """x w for w [K, N], x w^T for w [N, K] with `transpose_w`: [num_rows, N] in `dtype`.

  Args:
    x: of `operands`, padded where blocks need it.
    w8: w quantised, of `quantize_weights`: the copy that this product reads.
  """
  fmt, N = product.formats()[1], w.shape[0 if transpose_w else 1]
  if product.scaling == 'tensor':
    if w8 is None:
      w8 = quantize.quantize_tensor(w, fmt)
      w8 = w8 if transpose_w else Quantized(w8.values.T, w8.scale)
    # rounded before it is scaled: cuBLASLt then writes 16 bits, and the scaling joins what follows
    return _tensor_product(x, w8, implementation, dtype).astype(dtype)
  if w8 is None:
    blocks = quantize.quantize_blocks if transpose_w else quantize.quantize_blocks_transposed
    w8 = blocks(_pad(w, (TILE, TILE)), fmt)
  if implementation == 'simulated':
    y = _float32_product(quantize.dequantize_rows(x), quantize.dequantize_blocks(w8))
  else:
    one = Quantized(w8.values[None], w8.scale[None])
    y = grouped_matmul_fp8(x, one, _one_group(x.values.shape[0]), dtype=dtype)
  return y[:num_rows, :N].astype(dtype)


def weight_grad(
  x_KT: Quantized,
  dy_NT: Quantized,
  product: Product,
  implementation: str,
  *,
  shape: tuple[int, int],
  dtype: jnp.dtype,
) -> jax.Array:
  """x^T dy, [K, N] = `shape`, of the `operands` of both."""
  if product.scaling == 'tensor':
    return _tensor_product(x_KT, dy_NT, implementation, jnp.float32).astype(dtype)
  if implementation == 'simulated':
    dw = _float32_product(quantize.dequantize_rows(x_KT), quantize.dequantize_rows(dy_NT))
  else:
    dw = weight_grad_fp8(x_KT, dy_NT, _one_group(x_KT.values.shape[1]), dtype=dtype)[0]
  return dw[: shape[0], : shape[1]].astype(dtype)


def _one_group(num_rows: int) -> jax.Array:
  return jnp.full((1,), num_rows, jnp.int32)


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


def _pad(a: jax.Array, multiples: tuple[int, ...]) -> jax.Array:
  """Zeros behind, up to multiples of these; they change no scale and no sum."""
  missing = [(0, -n % m) for n, m in zip(a.shape, multiples, strict=True)]
  return jnp.pad(a, missing) if any(m for _, m in missing) else a
