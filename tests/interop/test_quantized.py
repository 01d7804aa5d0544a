"""FP8 checkpoints come in as the numbers that they stand for."""

import ml_dtypes
import numpy as np
import pytest
from checkpoints import V3, contents, random_tensors, write

from moe_jax import interop
from moe_jax.interop.export_hf import export_hf
from moe_jax.interop.import_hf import import_hf
from moe_jax.interop.quantized import dequantize

# uneven everywhere: 24 and 10 are no multiples of 7 and 5
BLOCK = (7, 5)
QUANTIZED = ('_proj.weight', '_proj_with_mqa.weight', 'gate_up_proj', 'down_proj')


def quantize(tensors, scale_dtype, block=BLOCK, name='{}_scale_inv'):
  """FP8 tensors with their scales, and what they stand for, worked out block by block."""
  stored, meant = {}, {}
  for key, a in tensors.items():
    stored[key] = meant[key] = a
    if not key.endswith(QUANTIZED):
      continue
    rows, columns = (-(-n // b) for n, b in zip(a.shape[-2:], block, strict=True))
    scale = np.zeros((*a.shape[:-2], rows, columns), np.float32)
    q, back = np.zeros(a.shape, ml_dtypes.float8_e4m3fn), np.zeros_like(a)
    for i in range(rows):
      for j in range(columns):
        at = (..., slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        one = np.abs(a[at]).max((-2, -1), keepdims=True) / 448
        if scale_dtype == ml_dtypes.float8_e8m0fnu:
          one = 2.0 ** np.ceil(np.log2(one))
        one = one.astype(scale_dtype).astype(np.float32)
        scale[..., i, j] = one[..., 0, 0]
        q[at] = a[at] / one
        back[at] = q[at].astype(np.float32) * one
    stored[key], meant[key] = q, back
    stored[name.format(key.removesuffix('.weight') if 'scale_inv' not in name else key)] = (
      scale.astype(scale_dtype)
    )
  return stored, meant


def config(block=BLOCK):
  q = dict(quant_method='fp8', fmt='e4m3', activation_scheme='dynamic')
  return V3 | dict(quantization_config=q | dict(weight_block_size=block))


def same_model(a, b, tmp_path):
  """Both folders load as the same variables, bit for bit."""
  for name, folder in (('x', a), ('y', b)):
    interop.save(*interop.load(folder), tmp_path / name)
  return contents(tmp_path / 'x') == contents(tmp_path / 'y')


@pytest.mark.parametrize(
  ('scale_dtype', 'name'),
  [
    (np.float32, '{}_scale_inv'),
    (ml_dtypes.bfloat16, '{}_scale_inv'),
    (ml_dtypes.float8_e8m0fnu, '{}_scale_inv'),
    (ml_dtypes.float8_e8m0fnu, '{}.scale'),
  ],
  ids=['float32 scales', 'bfloat16 scales', 'UE8M0 scales', 'UE8M0 scales named .scale'],
)
def test_ragged_blocks_are_multiplied_by_their_scale(scale_dtype, name, tmp_path):
  stored, meant = quantize(random_tensors(V3), scale_dtype, name=name)
  assert any(a.dtype == ml_dtypes.float8_e4m3fn for a in stored.values())
  a = write(tmp_path / 'a', config(), stored)
  b = write(tmp_path / 'b', V3, meant)
  assert same_model(a, b, tmp_path)


def test_blocks_of_128_need_no_config(tmp_path):
  stored, meant = quantize(random_tensors(V3), np.float32, block=(128, 128))
  a, b = write(tmp_path / 'a', V3, stored), write(tmp_path / 'b', V3, meant)
  assert same_model(a, b, tmp_path)


def test_packed_experts_have_packed_scales(tmp_path):
  folder = write(tmp_path / 'plain', V3, random_tensors(V3))
  interop.save(*interop.load(folder), tmp_path / 'packed', packed=True)
  tensors = {
    n: np.frombuffer(data, kind).reshape(shape)
    for n, (kind, shape, data) in contents(tmp_path / 'packed').items()
  }
  stored, meant = quantize(tensors, np.float32)
  assert stored['model.layers.1.mlp.experts.gate_up_proj_scale_inv'].shape == (6, 3, 5)
  a, b = write(tmp_path / 'a', config(), stored), write(tmp_path / 'b', V3, meant)
  assert same_model(a, b, tmp_path)


def test_import_makes_fp8_float32_and_export_can_cast_it(tmp_path):
  stored, _ = quantize(random_tensors(V3), np.float32)
  import_hf(write(tmp_path / 'a', config(), stored), tmp_path / 'ours')
  export_hf(tmp_path / 'ours', tmp_path / 'back', dtype='bfloat16')
  assert '"quantization_config"' not in (tmp_path / 'back' / 'config.json').read_text()
  cfg, _ = interop.load(tmp_path / 'back')
  assert cfg == interop.load(tmp_path / 'a')[0]


def test_fp8_weight_without_its_scale_is_refused(tmp_path):
  stored, _ = quantize(random_tensors(V3), np.float32)
  name = 'model.layers.1.mlp.experts.2.down_proj.weight_scale_inv'
  del stored[name]
  with pytest.raises(interop.InteropError, match=f'{name} is missing; it should have shape'):
    interop.load(write(tmp_path / 'a', config(), stored))


def test_scale_of_another_shape_is_refused(tmp_path):
  stored, _ = quantize(random_tensors(V3), np.float32)
  folder = write(tmp_path / 'a', config([5, 5]), stored)
  with pytest.raises(interop.InteropError, match=r'scale_inv has shape \[.*should have \['):
    interop.load(folder)


def test_scale_without_an_fp8_weight_is_extra(tmp_path):
  tensors = random_tensors(V3)
  tensors['model.layers.1.mlp.gate.weight_scale_inv'] = np.ones((1, 1), np.float32)
  with pytest.raises(interop.InteropError, match='extra tensor'):
    interop.load(write(tmp_path / 'a', config(), tensors))


def test_dequantize_knows_every_fp8_value():
  codes = np.arange(256, dtype=np.uint8).reshape(16, 16).view(ml_dtypes.float8_e4m3fn)
  got = dequantize(codes, np.full((1, 1), 2.0, np.float32), (128, 128))
  np.testing.assert_array_equal(got, codes.astype(np.float32) * 2)
