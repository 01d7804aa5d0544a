"""The two sizes of DeepSeek-V4: their parameters, and that their small versions learn."""

import dataclasses
import functools
import importlib
import json

import jax
import numpy as np
import pytest

from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.interop import families
from moe_jax.interop.fields import Fields
from moe_jax.interop.variables import one_device, target
from moe_jax.models.grouping import group_layers
from moe_jax.train import cost
from moe_jax.train.state import create
from moe_jax.train.step import make_train_step

# billions: in all, and used by one token, embedding and output head included
SIZES = {'v4_flash': ('284.33', '13.80'), 'v4_pro': ('1573.00', '49.78')}


def config(name, arg):
  module = importlib.import_module(f'experiments.configs.deepseek.{name}')
  return config_io.build(module.get_config(arg).to_dict())


@pytest.mark.parametrize('name', SIZES)
def test_parameters_are_as_many_as_published(name):
  cfg = config(name, 'full').model
  with jax.set_mesh(one_device()):
    counts = cost.parameters(cfg, target(cfg)['params']).values()
  total, active = (sum(getattr(c, part) for c in counts) for part in ('total', 'active'))
  assert (f'{total / 1e9:.2f}', f'{active / 1e9:.2f}') == SIZES[name]


@pytest.mark.parametrize('name', SIZES)
def test_full_config_is_what_its_published_config_json_says(name, tmp_path):
  cfg = config(name, 'full').model
  family = families.for_model(cfg)
  text = json.dumps({'model_type': family.MODEL_TYPE, **family.write_config(cfg)})
  (tmp_path / 'config.json').write_text(text)
  f = Fields(tmp_path / 'config.json')
  back = families.by_type(f).read_config(f)
  f.finish()
  assert back == dataclasses.replace(cfg, remat='none', d_ff=back.d_ff)


def test_repeating_layers_are_scanned():
  repeats = [
    (len(pattern), n) for pattern, n in group_layers(config('v4_flash', 'full').model.layers)
  ]
  assert repeats == [(1, 2), (1, 1), (2, 20)]


def losses(name, shape, steps):
  """The language loss of each step on one batch, over and over; and the last state."""
  cfg = config(name, 'tiny')
  rng = np.random.default_rng(0)
  B, S = cfg.data.batch_size, cfg.data.sequence_length
  ids = rng.integers(0, cfg.model.vocab_size, (B, S + 1)).astype(np.int32)
  with jax.set_mesh(sh.make_mesh(shape)):
    put = lambda a: jax.device_put(np.ascontiguousarray(a), sh.TOKENS)
    batch = {
      'tokens': put(ids[:, :-1]),
      'targets': put(ids[:, 1:]),
      'segments': put(np.ones((B, S), np.int32)),
      'positions': put(np.tile(np.arange(S, dtype=np.int32), (B, 1))),
      'loss_mask': put(np.ones((B, S), bool)),
    }
    state = jax.jit(functools.partial(create, cfg))(jax.random.key(0))
    table = np.asarray(state.router['group_0']['layer_0']['moe']['expert_VK'])
    step = jax.jit(make_train_step(cfg), donate_argnums=0)
    seen = []
    for _ in range(steps):
      state, metrics = step(state, batch)
      seen.append(float(metrics['train/lm_loss']))
    assert metrics['train/indexer_loss'] > 0 and not metrics['guard/skipped_total']
    np.testing.assert_array_equal(table, state.router['group_0']['layer_0']['moe']['expert_VK'])
  return np.asarray(seen)


@pytest.mark.slow
def test_tiny_overfits_one_batch_alike_on_one_device_and_on_eight():
  one = losses('v4_flash', (1, 1, 1), 100)
  assert one[-1] < 0.1 * one[0]
  eight = losses('v4_flash', (2, 2, 2), 10)
  # sums in another order differ by 1e-7, which training doubles every few steps
  np.testing.assert_allclose(eight, one[:10], rtol=1e-3)
