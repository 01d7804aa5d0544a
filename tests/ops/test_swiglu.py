"""SwiGLU's gradient and its quantised forms against autodiff and the plain quantisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import quantize as qz
from moe_jax.ops import swiglu as sg
from moe_jax.ops.swiglu import triton

# R rows  F width of gate and of up
R, F = 128, 256
FORMATS = (qz.Format(),) * 3
LIMITS = pytest.mark.parametrize('limit', [0.0, 0.7], ids=['free', 'clamped'])


def operands(dtype=jnp.float32, f=F):
  keys = jax.random.split(jax.random.key(0), 3)
  draw = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)
  da, h = draw(keys[0], R, f), draw(keys[1], R, 2 * f)
  return da, h.at[5].set(0), jax.random.normal(keys[2], (R,)).at[7].set(0)


@LIMITS
@pytest.mark.parametrize(
  ('backward', 'f'),
  [(sg.swiglu_backward, 256), (triton.backward, 200), (triton.backward, 640)],
  ids=['xla', 'triton', 'triton_in_parts'],
)
def test_backward_equals_autodiff(backward, f, limit):
  da, h, weight = operands(f=f)
  weighted = lambda h, weight: weight[:, None] * sg.swiglu(h[:, :f], h[:, f:], limit=limit)
  a, vjp = jax.vjp(weighted, h, weight)
  # before the call: it may reuse its operands' memory
  expected = vjp(da)
  dh, found_a, dweight = backward(da, h, weight, limit=limit)
  np.testing.assert_allclose(dh, expected[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(found_a, a, rtol=1e-5, atol=1e-6)
  # sums of up to 640 terms in another order
  np.testing.assert_allclose(dweight, expected[1], rtol=1e-5, atol=1e-4)


@LIMITS
def test_triton_quantises_swiglu_as_the_plain_quantiser_does(limit):
  _, h, _ = operands(jnp.bfloat16)
  (found,) = triton.forward_rows(h, qz.Format(), limit=limit)
  check(found, sg.swiglu_rows(h, qz.Format(), limit=limit))


def test_the_hidden_layer_is_kept_as_the_plain_quantiser_rounds_it():
  _, h, _ = operands(jnp.bfloat16)
  expected = qz.quantize_rows(h), sg.swiglu_rows(h, qz.Format())
  for a, kept in (
    sg.swiglu_rows_and_hidden(h, qz.Format()),
    triton.forward_rows(h, qz.Format(), limit=0.0, keep=True),
  ):
    check(a, expected[1])
    for x, y in zip(kept, expected[0], strict=True):
      np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize('backward', [sg.swiglu_backward, triton.backward], ids=['xla', 'triton'])
def test_backward_reads_a_quantised_hidden_layer(backward):
  da, h, weight = operands(jnp.bfloat16)
  kept = qz.quantize_rows(h)
  expected = sg.swiglu_backward(
    da.astype(jnp.float32), qz.dequantize_rows(kept), weight, implementation='xla'
  )
  found = backward(da, kept, weight, limit=0.0)
  assert found[0].dtype == da.dtype
  for x, y, tolerance in zip(found, expected, (2**-8, 2**-8, 1e-4), strict=True):
    # rounded once to bfloat16; the weight's gradient is a float32 sum in another order
    np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=tolerance, atol=1e-5)


def test_the_quantised_gradient_is_the_gradient_quantised():
  da, h, weight = operands(jnp.bfloat16)
  e5m2 = qz.Format(dtype='float8_e5m2')
  dh, a, dweight = sg.swiglu_backward(da, h, weight)
  expected = qz.quantize_rows(dh, e5m2), qz.quantize_columns(dh), qz.quantize_columns(a), dweight
  found = sg.swiglu_backward_quantized(da, h, weight, (e5m2, qz.Format(), qz.Format()))
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def check(found: qz.Quantized, expected: qz.Quantized) -> None:
  # exponentials differ in their last bits, which may turn a rounding: one step of 3 mantissa bits
  np.testing.assert_allclose(found.scale, expected.scale, rtol=2.0**-7)
  x, y = qz.dequantize_rows(found), qz.dequantize_rows(expected)
  step = np.maximum(np.abs(y) * 2.0**-3, np.repeat(np.asarray(expected.scale).T, 128, 1) * 2.0**-9)
  assert (np.abs(x - y) <= step * 1.01).all()
  assert (np.asarray(x) != np.asarray(y)).mean() < 0.02


def test_bad_widths_are_named():
  with pytest.raises(ValueError, match='width of 200 must be a multiple of 128'):
    sg.swiglu_rows(jnp.zeros((8, 400)), qz.Format())
  with pytest.raises(ValueError, match='100 rows must be a multiple of 128'):
    a = jnp.zeros((100, 256))
    sg.swiglu_backward_quantized(a[:, :128], a, a[:, 0], FORMATS)
