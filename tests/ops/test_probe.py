"""Probes change nothing, and see what a format loses."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.probe import NAMES, measure, measure_blocks, probe
from moe_jax.ops.quantize import Format

E4M3 = Format()


def seen(x, **options):
  return dict(zip(NAMES, np.asarray(measure(x, E4M3, **options)), strict=True))


def test_a_probe_passes_values_and_gradients_and_measures_both():
  x = jax.random.normal(jax.random.key(0), (4, 256))
  dy = jax.random.normal(jax.random.key(1), (4, 256)) * 1e-9
  y, backward = jax.vjp(lambda x, zeros: probe(x, zeros, E4M3), x, jnp.zeros((2, len(NAMES))))
  dx, measured = backward(dy)
  np.testing.assert_array_equal(y, x)
  np.testing.assert_array_equal(dx, dy)
  np.testing.assert_array_equal(measured, jnp.stack([measure(x, E4M3), measure(dy, E4M3)]))


def test_one_scale_loses_the_small_tile_beside_a_large_one_and_block_scales_do_not():
  x = jnp.concatenate([jnp.full((1, 128), 1.0), jnp.full((1, 128), 1e-7)], axis=1)
  whole, tiles = seen(x, by_tensor=True), seen(x)
  assert (whole['underflow'], tiles['underflow']) == (0.5, 0)
  np.testing.assert_allclose(whole['lost'], 1e-7, rtol=1e-3)
  assert tiles['error'] < 0.03
  assert tiles['scale_min'] < 1e-9 < 1e-3 < tiles['scale_max']


def test_values_that_are_not_finite_overflow():
  x = jnp.ones((1, 128)).at[0, 0].set(jnp.inf)
  assert seen(x)['overflow'] > 0


def test_blocks_share_a_scale_over_rows_too():
  w = jnp.ones((128, 256)).at[0].set(1e-7)
  blocks = dict(zip(NAMES, np.asarray(measure_blocks(w, E4M3)), strict=True))
  np.testing.assert_allclose(blocks['underflow'], 1 / 128)
