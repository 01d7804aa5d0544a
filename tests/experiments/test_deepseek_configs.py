"""The published models as configs: their sizes, and what their config.json says."""

import importlib
import json

import jax
import pytest

from moe_jax import config_io
from moe_jax.interop import families
from moe_jax.interop.fields import Fields
from moe_jax.interop.variables import one_device, target
from moe_jax.models.grouping import group_layers
from moe_jax.train import cost

# billions: in all, and used by one token, embedding and output head included
SIZES = {
  'moe_16b': ('16.38', '2.83'),
  'v2_lite': ('15.71', '2.66'),
  'v2': ('235.74', '21.38'),
  'v3': ('671.03', '37.55'),
  'v32': ('671.88', '38.40'),
  'v4_flash': ('284.33', '13.80'),
  'v4_pro': ('1573.00', '49.78'),
}
# what a published config.json does not hold: fields of attention kinds and layers that it lacks
UNSAID = {'v4_flash': {'remat', 'd_ff'}, 'v4_pro': {'remat', 'd_ff'}}
UNSAID_BEFORE_V4 = {'remat', 'full', 'mla'}


def config(name, arg):
  module = importlib.import_module(f'experiments.configs.deepseek.{name}')
  return config_io.build(module.get_config(arg).to_dict())


@pytest.mark.parametrize('name', SIZES)
def test_parameters_are_as_many_as_published(name):
  cfg = config(name, 'full').model
  with jax.set_mesh(one_device()):
    counts = cost.parameters(cfg, target(cfg)['params']).values()
  billions = lambda n: f'{n / 1e9:.2f}'
  total, active = (sum(getattr(c, part) for c in counts) for part in ('total', 'active'))
  assert (billions(total), billions(active)) == SIZES[name]


@pytest.mark.parametrize('name', SIZES)
def test_full_config_is_what_its_published_config_json_says(name, tmp_path):
  cfg = config(name, 'full').model
  family = families.for_model(cfg)
  text = json.dumps({'model_type': family.MODEL_TYPE, **family.write_config(cfg)})
  (tmp_path / 'config.json').write_text(text)
  f = Fields(tmp_path / 'config.json')
  back = families.by_type(f).read_config(f)
  f.finish()
  unsaid = UNSAID.get(name, UNSAID_BEFORE_V4)
  said = lambda model: {k: v for k, v in config_io.to_dict(model).items() if k not in unsaid}
  assert said(back) == said(cfg)


def test_repeating_layers_are_scanned():
  repeats = [
    (len(pattern), n) for pattern, n in group_layers(config('v4_flash', 'full').model.layers)
  ]
  assert repeats == [(1, 2), (1, 1), (2, 20)]
