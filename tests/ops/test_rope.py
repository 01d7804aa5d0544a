"""Rotary embeddings as complex rotations, and YaRN as its formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.rope import frequencies, rotate_adjacent, rotate_half_split, yarn_softmax_factor

# B batch  S sequence  H heads  C rotated channels
B, S, H, C = 2, 7, 3, 8
FREQ = frequencies(C, base=10_000.0)


def make_x():
  return jax.random.normal(jax.random.key(0), (B, S, H, C))


def make_positions():
  return jnp.asarray(np.random.default_rng(0).integers(0, 5000, (B, S)), jnp.int32)


def adjacent_pairs(x):
  x = np.asarray(x, np.float64)
  return x[..., 0::2] + 1j * x[..., 1::2]


def half_split_pairs(x):
  x = np.asarray(x, np.float64)
  return x[..., : C // 2] + 1j * x[..., C // 2 :]


LAYOUTS = pytest.mark.parametrize(
  ('rotate', 'pairs'),
  [(rotate_adjacent, adjacent_pairs), (rotate_half_split, half_split_pairs)],
  ids=['adjacent', 'half_split'],
)


@LAYOUTS
def test_rotation_is_a_product_with_complex_units(rotate, pairs):
  x, position = make_x(), make_positions()
  turn = np.exp(1j * np.asarray(position, np.float64)[..., None, None] * FREQ)
  # float32 angles of up to 5000 radians are off by up to 5000 * 2^-24
  np.testing.assert_allclose(pairs(rotate(x, position, FREQ)), pairs(x) * turn, atol=2e-3)


@LAYOUTS
def test_rotation_at_small_angles_is_exact_to_float32(rotate, pairs):
  x, position = make_x(), jnp.tile(jnp.arange(S), (B, 1))
  turn = np.exp(1j * np.asarray(position, np.float64)[..., None, None] * FREQ)
  np.testing.assert_allclose(pairs(rotate(x, position, FREQ)), pairs(x) * turn, atol=5e-6)


@LAYOUTS
def test_rotated_products_depend_on_distance_alone(rotate, pairs):
  q, k, position = make_x(), make_x()[::-1], jnp.tile(jnp.arange(S), (B, 1))

  def products(shift):
    turned = (rotate(a, position + shift, FREQ) for a in (q, k))
    return jnp.einsum('bshc,bthc->bhst', *turned)

  np.testing.assert_allclose(products(0), products(100), atol=2e-4)


@LAYOUTS
def test_rotation_of_bfloat16_is_rounded_once(rotate, pairs):
  x, position = make_x().astype(jnp.bfloat16), make_positions()
  y = rotate(x, position, FREQ)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    y, rotate(x.astype(jnp.float32), position, FREQ).astype(jnp.bfloat16)
  )


def yarn_formula(d, *, base, factor, length, fast, slow):
  """Written as DeepSeek's configuration states it, one pair at a time."""
  corr = lambda r: d * math.log(length / (2 * math.pi * r)) / (2 * math.log(base))
  low, high = max(math.floor(corr(fast)), 0), min(math.ceil(corr(slow)), d - 1)
  if low == high:
    high += 0.001
  out = []
  for i in range(d // 2):
    f = base ** (-2 * i / d)
    ramp = min(max((i - low) / (high - low), 0.0), 1.0)
    out.append(f * (1 - ramp) + f / factor * ramp)
  return np.array(out)


@pytest.mark.parametrize(
  'given',
  [
    dict(d=64, base=10_000.0, factor=40.0, length=4096, fast=32.0, slow=1.0),
    dict(d=8, base=10_000.0, factor=40.0, length=64, fast=32.0, slow=1.0),
    dict(d=64, base=160_000.0, factor=16.0, length=65_536, fast=32.0, slow=1.0),
    dict(d=16, base=10_000.0, factor=4.0, length=4, fast=1.0, slow=1.0),
  ],
  ids=['deepseek_v3', 'tiny_v2', 'deepseek_v4', 'ramp_without_width'],
)
def test_yarn_frequencies_equal_the_formula(given):
  found = frequencies(
    given['d'],
    base=given['base'],
    yarn_factor=given['factor'],
    yarn_original_length=given['length'],
    yarn_beta_fast=given['fast'],
    yarn_beta_slow=given['slow'],
  )
  np.testing.assert_allclose(found, yarn_formula(**given), rtol=1e-7)


def test_yarn_keeps_the_fastest_pair_and_slows_the_slowest():
  plain = frequencies(64, base=10_000.0)
  yarn = frequencies(64, base=10_000.0, yarn_factor=40.0)
  assert yarn[0] == plain[0]
  np.testing.assert_allclose(yarn[-1], plain[-1] / 40, rtol=1e-6)


def test_yarn_factor_of_one_changes_nothing():
  plain = frequencies(16, base=10_000.0)
  np.testing.assert_array_equal(frequencies(16, base=10_000.0, yarn_factor=1.0), plain)
  assert yarn_softmax_factor(1.0, 1.0) == 1.0


@pytest.mark.parametrize(('mscale', 'paper'), [(1.0, 1.3688879), (0.707, 1.2608038)])
def test_yarn_softmax_factor_is_the_square_of_the_papers_scale(mscale, paper):
  assert yarn_softmax_factor(40.0, mscale) == pytest.approx(paper**2, rel=1e-6)
