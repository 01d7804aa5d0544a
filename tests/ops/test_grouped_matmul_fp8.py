"""FP8 operands: both backends against the float32 product of the numbers they stand for."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.grouped_matmul import (
  grouped_matmul_fp8,
  mosaic_gpu,
  reference,
  tiles,
  weight_grad_fp8,
)
from moe_jax.ops.grouped_matmul.specs import Spec
from moe_jax.ops.grouped_matmul.tiles import Tile
from moe_jax.ops.quantize import Quantized

# Rows are those of padded groups, widths odd multiples of 128.
SPECS = [
  Spec(name='one_row', rows=128, d=128, f=128, sizes=(0, 1, 0)),
  Spec(name='uneven', rows=640, d=128, f=384, sizes=(70, 0, 130, 128)),
  # whole rounds, in which products and promotions overlap
  Spec(name='all_rows_to_one', rows=384, d=1024, f=128, sizes=(0, 300, 0)),
  Spec(name='no_rows_at_all', rows=256, d=128, f=128, sizes=(0, 0)),
  # three rounds and a rest, of a tile that one warpgroup passes by
  Spec(name='more_blocks_than_rounds_in_flight', rows=384, d=1664, f=128, sizes=(200, 20)),
  # 11 blocks: the last round is filled up with one of zeros
  Spec(name='rounds_filled_up', rows=256, d=1408, f=128, sizes=(70, 1)),
  Spec(name='rows_past_the_end', rows=512, d=128, f=128, sizes=(5, 100)),
]
# two kernels take several seconds in the interpreter
SOME = [pytest.param(s, marks=pytest.mark.slow) for s in SPECS]
# sums in float32, in another order
BOUND = 1e-6
# the tensor cores keep about 14 bits of a sum
GPU_BOUND = 1e-3


@pytest.fixture
def interpreter(monkeypatch, capfd):
  monkeypatch.setattr(mosaic_gpu, 'on_hopper', lambda: True)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()
  assert 'RACE DETECTED' not in ''.join(capfd.readouterr())


def operands(spec) -> Any:
  """Rows with NaN where they are nobody's, and blocks; then columns with zeros there.

  Made by numpy, for the sake of time: the values need not come from a quantisation.
  """
  rng = np.random.default_rng(0)
  experts, tiles_R = len(spec.sizes), spec.rows // 128
  taken = np.ceil(np.array(spec.sizes) / 128).astype(np.int32) * 128
  starts = np.cumsum(taken, dtype=np.int32) - taken
  owned_R = np.zeros(spec.rows, bool)
  for start, size in zip(starts, spec.sizes, strict=True):
    owned_R[start : start + size] = True

  def made(shape: Any, scale_shape: Any, owned: Any = True, other=0.0):
    values = np.where(owned, rng.normal(0, 100, shape).clip(-448, 448), other)
    scale = np.exp(rng.normal(size=scale_shape)).astype(np.float32)
    return Quantized(jnp.asarray(values.astype(ml_dtypes.float8_e4m3fn)), jnp.asarray(scale))

  d, f = spec.d, spec.f
  forward = (
    made((spec.rows, d), (d // 128, spec.rows), owned_R[:, None], np.nan),
    made((experts, f, d), (experts, f // 128, d // 128)),
  )
  backward = tuple(made((n, spec.rows), (tiles_R, n), owned_R) for n in (d, f))
  return forward, backward, jnp.array(spec.sizes, jnp.int32), jnp.asarray(starts)


def assert_close(got, want, bound=BOUND):
  got, want = np.asarray(got), np.asarray(want)
  assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def check(spec, implementation, bound=BOUND):
  forward, backward, sizes_E, offsets_E = operands(spec)
  how: Any = dict(dtype=jnp.float32, implementation=implementation)
  want = jax.jit(reference.forward_fp8)(*forward, offsets_E, sizes_E)
  assert_close(jax.jit(partial(grouped_matmul_fp8, **how))(*forward, sizes_E), want, bound)
  want = jax.jit(reference.weight_grad_fp8)(*backward, offsets_E, sizes_E)
  assert_close(jax.jit(partial(weight_grad_fp8, **how))(*backward, sizes_E), want, bound)


@pytest.mark.parametrize('spec', SPECS, ids=str)
def test_xla_matches_reference(spec):
  check(spec, 'xla')


@pytest.mark.parametrize('spec', SOME, ids=str)
def test_kernels_match_reference(interpreter, spec):
  check(spec, 'mosaic')


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.on_hopper(), reason='needs a Hopper GPU')
@pytest.mark.parametrize('spec', SPECS, ids=str)
def test_kernels_match_reference_on_a_gpu(spec):
  check(spec, 'mosaic', GPU_BOUND)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['uneven', 'more_blocks_than_rounds_in_flight'])
def test_single_blocks_match_reference(interpreter, monkeypatch, name):
  monkeypatch.setattr(tiles, 'choose', lambda *_: Tile(m=128, n=128, k=128, stages=4, pair=1))
  check(next(s for s in SPECS if s.name == name), 'mosaic')


@pytest.mark.slow
def test_bfloat16_result_is_the_float32_one_rounded(interpreter):
  forward, backward, sizes_E, _ = operands(SPECS[2])
  calls: Any = ((grouped_matmul_fp8, forward), (weight_grad_fp8, backward))
  for op, args in calls:
    wide, narrow = (op(*args, sizes_E, dtype=t) for t in (jnp.float32, jnp.bfloat16))
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), narrow)


def test_bad_input_is_one_clear_line():
  (x, w), (x_t, dy_t), sizes_E, offsets_E = operands(SPECS[1])
  with pytest.raises(ValueError, match=r'x \(640, 128\) and w \(4, 128, 384\) must be \[R, K\]'):
    grouped_matmul_fp8(x, Quantized(w.values.swapaxes(1, 2), w.scale), sizes_E)
  with pytest.raises(ValueError, match=r'scale float32\(640, 1\), which must be float32\(1, 640\)'):
    grouped_matmul_fp8(Quantized(x.values, x.scale.T), w, sizes_E)
  with pytest.raises(ValueError, match='must be multiples of 128: padded_offsets'):
    grouped_matmul_fp8(x, w, sizes_E, offsets_E=offsets_E + 8)
  with pytest.raises(ValueError, match='groups end at row 768, after the 640 rows'):
    grouped_matmul_fp8(x, w, sizes_E + jnp.array([0, 0, 300, 0], jnp.int32))
  with pytest.raises(ValueError, match=r'sizes is int32\(3,\), must be int32\[4\]'):
    grouped_matmul_fp8(x, w, sizes_E[:3])
  with pytest.raises(ValueError, match='rows and widths must be multiples of 128'):
    weight_grad_fp8(Quantized(x_t.values[:5], x_t.scale[:, :5]), dy_t, sizes_E)
  with pytest.raises(NotImplementedError, match='needs a Hopper GPU'):
    grouped_matmul_fp8(x, w, sizes_E, implementation='mosaic')


@pytest.mark.slow
def test_kernels_add_into_an_array(interpreter):
  check_into('mosaic', jnp.bfloat16)


def test_xla_adds_into_an_array():
  check_into('xla', jnp.float32)


def check_into(implementation, dtype):
  spec = SPECS[1]
  _, (x, dy), sizes_E, _ = operands(spec)
  call = jax.jit(partial(weight_grad_fp8, dtype=jnp.float32, implementation=implementation))
  old = jnp.full((len(spec.sizes), spec.d, spec.f), 1000, dtype)
  add: Any = partial(weight_grad_fp8, dtype=dtype, implementation=implementation)
  got = jax.jit(lambda old: add(x, dy, sizes_E, into=old))(old)
  # the backends add in different orders
  want = call(x, dy, sizes_E) + 1000
  np.testing.assert_allclose(got.astype(jnp.float32), want.astype(dtype), rtol=2**-7, atol=0.5)
