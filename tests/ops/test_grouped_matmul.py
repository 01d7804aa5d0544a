"""The XLA backend against the reference over every named shape, and the op's contract."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from moe_jax.ops.grouped_matmul import grouped_matmul, layout, padded_offsets, reference
from moe_jax.ops.grouped_matmul import weight_grad as weight_grad_of
from moe_jax.ops.grouped_matmul.specs import ODD, SIZES, UGLY, Spec

SPECS = [*UGLY, *ODD]
# Each backend rounds a float32 sum of at most 328 products once; orders of summation differ.
FLOAT32 = {'rtol': 1e-5, 'atol': 1e-4}
# One bfloat16 rounding of sums that differ in float32's last bits: half a step is 2**-9.
BFLOAT16 = {'rtol': 2**-7, 'atol': 1e-2}


def operands(spec: Spec, dtype=jnp.float32):
  """x, w and dy with NaN in every row of nobody, and the sizes and offsets."""
  sizes_E = jnp.array(spec.sizes, jnp.int32)
  offsets_E = None if spec.offsets is None else jnp.array(spec.offsets, jnp.int32)
  starts = layout.compact_offsets(sizes_E) if offsets_E is None else offsets_E
  owned = np.zeros((spec.rows, 1), bool)
  for start, size in zip(np.asarray(starts), spec.sizes, strict=True):
    owned[start : start + size] = True
  kx, kw, ky = jax.random.split(jax.random.key(0), 3)
  x_RD = jnp.where(owned, jax.random.normal(kx, (spec.rows, spec.d), dtype), jnp.nan)
  w_EDF = jax.random.normal(kw, (len(spec.sizes), spec.d, spec.f), dtype)
  dy_RF = jnp.where(owned, jax.random.normal(ky, (spec.rows, spec.f), dtype), jnp.nan)
  return x_RD, w_EDF, dy_RF, sizes_E, offsets_E, starts


def close(got, want, tolerance):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **tolerance)


@pytest.mark.parametrize('spec', SPECS, ids=str)
def test_xla_matches_reference_and_its_gradients(spec):
  x_RD, w_EDF, dy_RF, sizes_E, offsets_E, starts = operands(spec)

  @jax.jit
  def ours(x, w, dy, sizes):
    call = lambda x, w: grouped_matmul(x, w, sizes, offsets_E=offsets_E, implementation='xla')
    y, pull = jax.vjp(call, x, w)
    return y, pull(dy)

  @jax.jit
  def theirs(x, w, dy, sizes):
    y, pull = jax.vjp(lambda x, w: reference.forward(x, w, starts, sizes), x, w)
    return y, pull(dy)

  got, want = ours(x_RD, w_EDF, dy_RF, sizes_E), theirs(x_RD, w_EDF, dy_RF, sizes_E)
  close(got, want, FLOAT32)
  assert not any(jnp.isnan(a).any() for a in jax.tree.leaves(got))


def test_empty_experts_get_exactly_zero_gradient():
  x_RD, w_EDF, dy_RF, sizes_E, _, _ = operands(UGLY[5])
  _, pull = jax.vjp(lambda w: grouped_matmul(x_RD, w, sizes_E), w_EDF)
  np.testing.assert_array_equal(pull(dy_RF)[0][np.asarray(sizes_E) == 0], 0)


@pytest.mark.parametrize('spec', SPECS[4:7], ids=str)
def test_bfloat16_is_one_rounding_from_the_reference(spec):
  x_RD, w_EDF, _, sizes_E, _, starts = operands(spec, jnp.bfloat16)
  got = grouped_matmul(x_RD, w_EDF, sizes_E, implementation='xla')
  assert got.dtype == jnp.bfloat16
  close(got, reference.forward(x_RD, w_EDF, starts, sizes_E), BFLOAT16)


def test_master_weights_get_a_gradient_that_was_never_rounded():
  spec = SPECS[4]
  x_RD, w_EDF, dy_RF, sizes_E, _, starts = operands(spec, jnp.bfloat16)
  master_EDF = w_EDF.astype(jnp.float32)
  _, pull = jax.vjp(lambda w: grouped_matmul(x_RD, w, sizes_E), master_EDF)
  wide = [a.astype(jnp.float32) for a in (x_RD, master_EDF, dy_RF)]
  _, exact = jax.vjp(lambda w: reference.forward(wide[0], w, starts, sizes_E), wide[1])
  assert pull(dy_RF)[0].dtype == jnp.float32
  close(pull(dy_RF)[0], exact(wide[2])[0], FLOAT32)
  direct = weight_grad_of(x_RD, dy_RF, sizes_E, dtype=jnp.float32)
  np.testing.assert_array_equal(direct, pull(dy_RF)[0])


def test_two_runs_give_the_same_bits():
  x_RD, w_EDF, dy_RF, sizes_E, _, _ = operands(ODD[2])
  step = jax.jit(lambda x, w: jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E), x, w)[1](dy_RF))
  first, second = step(x_RD, w_EDF), step(x_RD, w_EDF)
  assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_weights_larger_than_a_batch_of_blocks_give_the_same_result(monkeypatch):
  from moe_jax.ops.grouped_matmul import xla

  x_RD, w_EDF, _, sizes_E, _, starts = operands(ODD[2])
  monkeypatch.setattr(xla, '_WEIGHT_BYTES', 3 * w_EDF[0].nbytes)
  want = reference.forward(x_RD, w_EDF, starts, sizes_E)
  close(xla.forward(x_RD, w_EDF, starts, sizes_E), want, FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize('check_vma', [True, False], ids=['checked', 'unchecked'])
def test_shard_map_over_eight_devices_equals_one(check_vma):
  rows, d, f, experts, devices = 24, 8, 12, 3, 8
  mesh = jax.make_mesh((4, 2), ('data', 'expert'))
  both = P(('data', 'expert'))
  kx, kw = jax.random.split(jax.random.key(1))
  x_RD = jax.random.normal(kx, (devices * rows, d))
  w_EDF = jax.random.normal(kw, (experts, d, f))
  sizes = jnp.array([[10, 0, 9], [0, 0, 24], [0, 0, 0], [8, 8, 8]] * 2, jnp.int32)

  def local(x, w, sizes):
    return (grouped_matmul(x, w, sizes) ** 2).sum()

  def sharded(x, w, sizes):
    value, grads = jax.value_and_grad(local, argnums=(0, 1))(x, w, sizes.reshape(-1))
    if not check_vma:
      grads = grads[0], jax.lax.psum(grads[1], ('data', 'expert'))
    return jax.lax.psum(value, ('data', 'expert')), *grads

  def whole(x, w):
    parts = zip(jnp.split(x, devices), sizes, strict=True)
    return sum(local(part, w, size) for part, size in parts)

  with jax.set_mesh(mesh):
    run = jax.shard_map(
      sharded, in_specs=(both, P(), both), out_specs=(P(), both, P()), check_vma=check_vma
    )
    args = jax.device_put(x_RD, both), w_EDF, jax.device_put(sizes, both)
    got = jax.device_get(jax.jit(run)(*args))
  value, grads = jax.value_and_grad(whole, argnums=(0, 1))(x_RD, w_EDF)
  # gradients are sums of up to 192 products of order 10
  close(got, (value, *grads), {'rtol': 1e-5, 'atol': 1e-3})


def test_scan_and_remat_leave_the_gradient_alone():
  x_RD, w_EDF, _, sizes_E, _, _ = operands(Spec(name='', rows=40, d=8, f=8, sizes=(9, 0, 31)))

  def layers(w, wrap):
    body = wrap(lambda x, w: (jnp.tanh(grouped_matmul(x, w, sizes_E)), None))
    return jax.lax.scan(body, x_RD, jnp.stack([w, w]))[0].sum()

  plain = jax.grad(layers)(w_EDF, lambda f: f)
  close(jax.jit(jax.grad(layers), static_argnums=1)(w_EDF, jax.checkpoint), plain, FLOAT32)


def test_padded_offsets_start_groups_on_multiples():
  offsets = padded_offsets(jnp.array([5, 0, 128, 1], jnp.int32), 128)
  assert offsets.tolist() == [0, 128, 128, 256]
  assert offsets.dtype == jnp.int32


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
def test_benchmark_sizes_use_every_row(sizes):
  assert sum(sizes(1000, 7)) == 1000


def test_bad_input_is_one_clear_line():
  x, w, sizes = jnp.zeros((8, 4)), jnp.zeros((2, 4, 6)), jnp.array([3, 5], jnp.int32)
  with pytest.raises(ValueError, match=r'x \(8, 4\) and w \(2, 6, 4\) must be \[R, D\]'):
    grouped_matmul(x, w.swapaxes(1, 2), sizes)
  with pytest.raises(ValueError, match='x is int32 and w float32'):
    grouped_matmul(x.astype(jnp.int32), w, sizes)
  with pytest.raises(ValueError, match=r'sizes is int32\(3,\), must be int32\[2\]'):
    grouped_matmul(x, w, jnp.zeros(3, jnp.int32))
  with pytest.raises(ValueError, match='sizes sum to 9, more than the 8 rows'):
    grouped_matmul(x, w, jnp.array([4, 5], jnp.int32))
  with pytest.raises(ValueError, match="implementation='cuda' must be"):
    grouped_matmul(x, w, sizes, implementation='cuda')
  with pytest.raises(NotImplementedError, match='mosaic: needs a Hopper GPU'):
    grouped_matmul(x, w, sizes, implementation='mosaic')


def test_fallback_is_logged_once_with_its_reason(caplog):
  from moe_jax.ops import backends

  backends.log_fallback.cache_clear()
  x, w, sizes = jnp.zeros((8, 4)), jnp.zeros((2, 4, 6)), jnp.array([3, 5], jnp.int32)
  with caplog.at_level(logging.INFO, backends.__name__):
    grouped_matmul(x, w, sizes)
    grouped_matmul(x, w, sizes)
  assert [r.getMessage() for r in caplog.records] == [
    'grouped_matmul: xla instead of mosaic, which needs a Hopper GPU (compute capability 9.0), '
    'this is cpu.'
  ]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_weight_gradient_adds_into_an_array(dtype):
  spec = SPECS[4]
  x_RD, w_EDF, dy_RF, sizes_E, _, _ = operands(spec, jnp.bfloat16)
  old_EDF = jnp.full(w_EDF.shape, 3, dtype)
  call = lambda **how: weight_grad_of(x_RD, dy_RF, sizes_E, implementation='xla', **how)
  got = jax.jit(lambda old: call(dtype=dtype, into=old))(old_EDF)
  assert got.dtype == dtype
  # in bfloat16 one rounding of a sum near 16
  close(got, call(dtype=jnp.float32) + 3, FLOAT32 if dtype == jnp.float32 else BFLOAT16)
  with pytest.raises(ValueError, match=r'into is float32\(3,\), must be'):
    call(dtype=dtype, into=jnp.zeros(3))
