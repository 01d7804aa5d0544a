"""FP8 is watched in all layers, by their names, and a layer that loses gradient is told."""

import functools

import jax
import numpy as np
import pytest

from experiments.bench.steps import batch_like_text
from experiments.configs import precision
from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.ops.probe import NAMES
from moe_jax.train.state import create
from moe_jax.train.watch import lost_gradient, make_watch


def config(name: str):
  c = precision.get_config('tiny')
  c.precision = name
  return config_io.build(c.to_dict())


def test_other_policies_are_not_watched():
  assert make_watch(config('bfloat16')) is None


@pytest.mark.slow
def test_every_layer_is_measured_and_block_scales_lose_nothing():
  cfg, mesh = config('fp8_block'), sh.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    state = jax.jit(functools.partial(create, cfg))(jax.random.key(0))
    batch = jax.device_put(batch_like_text(cfg), jax.sharding.NamedSharding(mesh, sh.TOKENS))
    watch = make_watch(cfg)
    assert watch is not None
    seen = watch(state, batch)
  kinds = ('activations', 'gradients', 'weights')
  assert set(seen) == {f'fp8/{kind}_{name}' for kind in kinds for name in NAMES}
  for kind in kinds:
    # e4m3 has 3 bits: relative errors are uniform up to 2^-4, 2.6% in the mean square
    error_L = np.asarray(seen[f'fp8/{kind}_error'])
    assert error_L.shape == (cfg.model.num_layers,)
    assert (error_L > 0.015).all() and (error_L < 0.04).all()
    assert np.asarray(seen[f'fp8/{kind}_lost']).max() < 1e-4
    assert np.asarray(seen[f'fp8/{kind}_overflow']).max() == 0


def test_the_warning_names_the_layer_that_loses_most():
  values = {'fp8/gradients_lost': [0.0, 0.2, 0.05]}
  text = lost_gradient(values, 0.01)
  assert text is not None and '20.00%' in text and 'layer 1' in text
  assert lost_gradient(values, 0.5) is None
  assert lost_gradient({}, 0.01) is None
