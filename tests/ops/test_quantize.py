"""Quantisation against numpy and the float64 definition of a scale."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.ops import quantize as qz
from moe_jax.ops.quantize import triton
from moe_jax.ops.quantize.format import magnitude, scale_and_inverse

E4M3, E5M2 = qz.Format(), qz.Format(dtype='float8_e5m2')
FORMATS = pytest.mark.parametrize(
  'fmt',
  [E4M3, E5M2, qz.Format(power_of_two=True), qz.Format(dtype='float8_e5m2', power_of_two=True)],
  ids=['e4m3', 'e5m2', 'e4m3_pow2', 'e5m2_pow2'],
)
SLOW = pytest.mark.slow
LARGEST = {'float8_e4m3fn': 448.0, 'float8_e5m2': 57344.0}


def sample(shape, seed=0, dtype=jnp.bfloat16):
  """Tiles of very different magnitude, one row of zeros, one tile of zeros."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, (shape[0], 1))
  x[3] = 0
  x[:128, :128] = 0
  return jnp.asarray(x, dtype)


@FORMATS
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32], ids=['bf16', 'f32'])
def test_largest_value_of_a_tile_uses_the_range_and_never_leaves_it(fmt, dtype):
  amax = np.abs(np.random.default_rng(1).standard_normal(4096)) * 2.0 ** np.linspace(-90, 90, 4096)
  amax = np.asarray(jnp.asarray(amax, dtype), np.float64)
  scale, inverse = (
    np.asarray(a, np.float64) for a in scale_and_inverse(magnitude(jnp.asarray(amax)), fmt)
  )
  largest = LARGEST[fmt.dtype]
  assert (np.float32(amax) * np.float32(inverse) <= largest).all()
  if fmt.power_of_two:
    np.testing.assert_array_equal(scale, 2.0 ** np.ceil(np.log2(amax / largest)))
    np.testing.assert_array_equal(scale * inverse, 1)
  else:
    # amax has at most 8 bits: exact but for the roundings of 1/448 and of the product
    kept = np.asarray(jnp.asarray(amax, jnp.bfloat16), np.float64)
    up = 1 if dtype == jnp.bfloat16 else 1 + 2.0**-7
    assert (scale >= kept / largest * (1 - 2.0**-7 * (up > 1) - 1e-6)).all()
    assert (scale <= amax / largest * up * (1 + 2.0**-22)).all()
    np.testing.assert_allclose(scale * inverse, 1, rtol=2.0**-21)


@FORMATS
def test_rows_round_to_the_nearest_value_of_the_format(fmt):
  x = sample((256, 384))
  q = qz.quantize_rows(x, fmt)
  assert q.values.shape == (256, 384) and q.scale.shape == (3, 256)
  x_RCc = np.asarray(x, np.float32).reshape(256, 3, 128)
  _, inverse = scale_and_inverse(magnitude(jnp.asarray(x_RCc)).max(-1), fmt)
  expected = (x_RCc * np.asarray(inverse)[..., None]).astype(ml_dtypes.finfo(fmt.dtype).dtype)
  np.testing.assert_array_equal(
    np.asarray(q.values).view(np.uint8), expected.reshape(256, 384).view(np.uint8)
  )
  # half a step of 3 or 2 mantissa bits, or half the smallest step where values are tiny
  step = {'float8_e4m3fn': (2.0**-4, 2.0**-10), 'float8_e5m2': (2.0**-3, 2.0**-17)}[fmt.dtype]
  error = np.abs(np.asarray(qz.dequantize_rows(q), np.float64) - np.asarray(x, np.float64))
  scale_RK = np.repeat(np.asarray(q.scale, np.float64).T, 128, 1)
  bound = np.maximum(np.abs(np.asarray(x, np.float64)) * step[0], scale_RK * step[1])
  assert (error <= bound * (1 + 1e-5)).all()


def test_zeros_are_zeros_with_a_finite_scale():
  q = qz.quantize_rows(jnp.zeros((8, 128), jnp.bfloat16))
  assert (np.asarray(q.values, np.float32) == 0).all() and np.isfinite(q.scale).all()
  floored = qz.quantize_rows(jnp.zeros((8, 128)), qz.Format(floor=1e-4))
  np.testing.assert_allclose(floored.scale, 1e-4 / 448, rtol=2.0**-7)


@FORMATS
@pytest.mark.parametrize('bad', [np.nan, np.inf], ids=str)
def test_a_value_that_is_not_finite_makes_its_tile_not_finite(fmt, bad):
  x = sample((128, 256)).at[5, 130].set(bad)
  q = qz.quantize_rows(x, fmt)
  assert not np.isfinite(q.scale[1, 5]) and np.isfinite(q.scale[0]).all()
  assert not np.isfinite(qz.quantize_tensor(x, fmt).scale)


def test_columns_are_the_rows_of_the_transpose():
  x = sample((256, 384))
  row, column = qz.quantize_rows_and_columns(x)
  for got, expected in (
    (row, qz.quantize_rows(x)),
    (column, qz.quantize_rows(x.T)),
    (qz.quantize_columns(x), column),
  ):
    for a, b in zip(got, expected, strict=True):
      np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_blocks_of_the_transpose_are_the_transposed_blocks():
  w = jnp.stack([sample((256, 384), seed) for seed in range(2)])
  q = qz.quantize_blocks(w)
  assert q.values.shape == (2, 256, 384) and q.scale.shape == (2, 2, 3)
  for a, b in zip(qz.transpose_blocks(q), qz.quantize_blocks(jnp.swapaxes(w, 1, 2)), strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
  largest = np.abs(np.asarray(w, np.float32)).reshape(2, 2, 128, 3, 128).max((2, 4))
  np.testing.assert_allclose(q.scale, np.maximum(largest, 2.0**-100) / 448, rtol=2.0**-22)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match='a width of 100 must be a multiple of 128'):
    qz.quantize_rows(jnp.zeros((4, 100)))
  with pytest.raises(ValueError, match='a number of rows of 100 must be'):
    qz.quantize_columns(jnp.zeros((100, 128)))
  with pytest.raises(ValueError, match="dtype='float16'"):
    qz.Format(dtype='float16')
  with pytest.raises(ValueError, match='floor'):
    qz.Format(floor=0.0)


def test_values_do_not_depend_on_jit():
  x = sample((256, 256), dtype=jnp.float32)
  for a, b in zip(qz.quantize_rows(x), jax.jit(qz.quantize_rows)(x), strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def same(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


SOME = pytest.mark.parametrize(
  'fmt', [E4M3, pytest.param(qz.Format(dtype='float8_e5m2', power_of_two=True), marks=SLOW)]
)


@SOME
def test_triton_quantises_to_the_bits_of_the_reference(fmt):
  x = sample((128, 256)).at[5, 130].set(jnp.inf)
  expected = qz.quantize_rows_and_columns(x, fmt)
  same(triton.quantize(x, fmt, by_row=True, by_column=True), expected)


def test_triton_quantises_any_number_of_rows():
  x = sample((77, 256), dtype=jnp.float32)
  same(triton.quantize(x, E4M3, by_row=True), [qz.quantize_rows(x)])


def test_triton_quantises_gathered_rows():
  x, token_R = sample((50, 128)), jax.random.randint(jax.random.key(0), (128,), 0, 55)
  found = triton.quantize(x, E4M3, token_R=token_R, by_row=True, by_column=True)
  same(found, qz.quantize_rows_and_columns(x, token_R=token_R))
  gathered = jnp.where((token_R < 50)[:, None], x[token_R], 0)
  same(found, qz.quantize_rows_and_columns(gathered))


@SOME
def test_triton_quantises_blocks_both_ways(fmt):
  w = jnp.stack([sample((256, 128), seed) for seed in range(2)])
  found = triton.blocks(w, fmt, want=('plain', 'transposed'))
  same(found, qz.quantize_blocks_and_transposed(w, fmt))
  same(found[1], qz.quantize_blocks(jnp.swapaxes(w, 1, 2), fmt))
  same(triton.blocks(w, fmt, want=('transposed',)), [found[1]])


def test_launches_of_one_shape_share_one_function():
  # or a step in FP8 would lower and compile some hundred kernels
  x = jnp.zeros((128, 128))
  launch = lambda a: triton.quantize(a, E4M3, by_row=True)
  jaxpr = jax.make_jaxpr(lambda a, b: (launch(a), launch(b)))(x, x + 1)
  launched = [e.params['jaxpr'] for e in jaxpr.eqns if e.primitive.name in ('jit', 'pjit')]
  assert len(launched) == 2
  assert launched[0] is launched[1]
