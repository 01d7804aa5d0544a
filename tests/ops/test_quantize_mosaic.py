"""The Hopper kernels that quantise, in the interpreter with its race detector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops import quantize as qz
from moe_jax.ops import swiglu
from moe_jax.ops.quantize import mosaic
from moe_jax.ops.swiglu import mosaic as swiglu_mosaic

E4M3 = qz.Format()
FORMATS = pytest.mark.parametrize(
  'fmt',
  [E4M3, pytest.param(qz.Format(dtype='float8_e5m2', power_of_two=True), marks=pytest.mark.slow)],
  ids=['e4m3', 'e5m2_pow2'],
)


@pytest.fixture(autouse=True)
def interpreter(capfd):
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()
  assert 'RACE DETECTED' not in ''.join(capfd.readouterr())


def sample(shape, seed=0, dtype=jnp.bfloat16):
  """Rows of very different magnitude, and a tile of zeros."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, (*shape[:-1], 1))
  x[..., :128, :128] = 0
  return jnp.asarray(x, dtype)


def same(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@FORMATS
def test_rows_and_columns_have_the_bits_of_the_reference(fmt):
  # an odd number of tiles: shares of the work differ, and rings are used again
  x = sample((128, 384))
  same(
    mosaic.rows_and_columns(x, fmt, native=False),
    qz.quantize_rows_and_columns(x, fmt, implementation='xla'),
  )


@pytest.mark.parametrize(
  ('dtype', 'via'),
  [(jnp.bfloat16, None), (jnp.float32, jnp.bfloat16)],
  ids=['bf16', 'f32_through_bf16'],
)
def test_blocks_both_ways_have_the_bits_of_the_reference(dtype, via):
  w = sample((2, 128, 384), dtype=dtype)
  same(
    mosaic.blocks(w, E4M3, via=via, native=False),
    qz.quantize_blocks_and_transposed(w, via=via, implementation='xla'),
  )


@pytest.mark.parametrize('kept_in_fp8', [True, False], ids=['fp8_hidden', 'bf16_hidden'])
def test_gradient_of_swiglu_is_the_quantised_gradient(kept_in_fp8):
  R, F = 128, 256
  keys = jax.random.split(jax.random.key(0), 3)
  da = jax.random.normal(keys[0], (R, F), jnp.bfloat16)
  h = jax.random.normal(keys[1], (R, 2 * F), jnp.bfloat16)
  if kept_in_fp8:
    h = qz.quantize_rows(h, implementation='xla')
  operands = da, h, jax.random.normal(keys[2], (R,)).at[7].set(0)
  fmts = (qz.Format(dtype='float8_e5m2'), E4M3, E4M3)
  *found, dweight = swiglu_mosaic.backward_quantized(*operands, fmts, limit=0.7, native=False)
  *expected, exact = swiglu.swiglu_backward_quantized(
    *operands, fmts, limit=0.7, implementation='xla'
  )
  for q, p in zip(found, expected, strict=True):
    assert q.values.dtype == p.values.dtype
    # the sigmoid's last bit may turn a rounding to bfloat16, and that one to 8 bits
    np.testing.assert_allclose(q.scale, p.scale, rtol=2.0**-7)
    assert (np.asarray(q.values, np.float32) != np.asarray(p.values, np.float32)).mean() < 1e-3
  # float32 sums in another order
  np.testing.assert_allclose(dweight, exact, rtol=1e-5, atol=1e-5)


def test_a_named_kernel_says_what_it_lacks():
  with pytest.raises(NotImplementedError, match='mosaic: needs a Hopper GPU'):
    qz.quantize_rows_and_columns(sample((128, 128)), implementation='mosaic')
  with pytest.raises(ValueError, match=r"must be None or in \['triton', 'xla'\]"):
    qz.quantize_rows(sample((128, 128)), implementation='mosaic')
