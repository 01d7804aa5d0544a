"""From dictionaries to dataclasses and back."""

import json

import pytest

from experiments.configs.base import base
from moe_jax import config_io
from moe_jax.config import DataConfig, DomainConfig, ModelConfig, OptimConfig, RunConfig
from moe_jax.config_io import build, flatten, nearest, to_dict


def test_build_of_nothing_is_the_defaults():
  assert build({}) == RunConfig()


def test_build_undoes_to_dict():
  cfg = RunConfig(
    steps=7,
    routing={'z_loss': {'weight': 0.5}},
    model=ModelConfig(num_layers=2, attention_per_layer=('mla', 'full')),
    data=DataConfig(domains={'a': DomainConfig(source='plays', weight=2.0)}),
    optim=OptimConfig(step_fractions=(0.5,)),
  )
  assert build(to_dict(cfg)) == cfg


def test_build_undoes_json():
  cfg = RunConfig(optim=OptimConfig(step_fractions=(0.25, 0.5)))
  assert build(json.loads(json.dumps(to_dict(cfg)))) == cfg


def test_every_config_has_the_fields_of_the_dataclasses():
  assert build(base().to_dict()).model == ModelConfig()


def test_an_integer_is_taken_for_a_float():
  learning_rate = build({'optim': {'lr_peak': 1}}).optim.lr_peak
  assert learning_rate == 1.0
  assert type(learning_rate) is float


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'stepz': 1}, 'stepz is not a field of this config. Did you mean steps?'),
    ({'optim': {'lr_peek': 1.0}}, 'optim.lr_peek is not a field of this config. Did you mean'),
    ({'model': {'moe': {'xyz': 1}}}, 'model.moe.xyz is not a field of this config. Known here: d_'),
    ({'steps': 10.0}, 'steps=10.0 must be int, not float.'),
    ({'steps': True}, 'steps=True must be int, not bool.'),
    ({'steps': '10'}, "steps='10' must be int, not str."),
    ({'optim': {'lr_peak': '1e-3'}}, "optim.lr_peak='1e-3' must be float, not str."),
    ({'log': {'tensorboard': 1}}, 'log.tensorboard=1 must be bool, not int.'),
    ({'optim': 3}, 'optim=3 must be a group of fields, not a int.'),
    ({'optim': {'step_fractions': 0.5}}, 'optim.step_fractions=0.5 must be tuple[float, ...]'),
    ({'optim': {'step_fractions': ['a']}}, "optim.step_fractions[0]='a' must be float"),
    ({'data': {'domains': {'a': {'source': 1}}}}, 'data.domains.a.source=1 must be str'),
    ({'data': {'domains': {'a': {'sauce': 'x'}}}}, 'data.domains.a.sauce is not a field'),
    ({'data': {'domains': ['plays']}}, "data.domains=['plays'] must be"),
    ({'seed': None}, 'seed=None must be int, not NoneType.'),
  ],
  ids=lambda value: '' if isinstance(value, dict) else value.partition(' ')[0],
)
def test_build_refuses_in_one_line(values, message):
  with pytest.raises(ValueError) as error:
    build(values)
  assert str(error.value).startswith(message)
  assert '\n' not in str(error.value)


def test_build_refuses_a_domain_without_a_source():
  with pytest.raises(ValueError, match=r'data\.domains\.a\.source is missing'):
    build({'data': {'domains': {'a': {'weight': 1.0}}}})


def test_nearest_suggests_or_lists():
  assert nearest('stepps', ['steps', 'seed']) == 'Did you mean steps?'
  assert nearest('qqq', ['steps', 'seed']) == 'Known here: seed, steps.'


def test_flatten_joins_names_and_keeps_empty_groups():
  assert flatten({'a': {'b': 1, 'c': {}}, 'd': (2,)}) == {'a.b': 1, 'a.c': {}, 'd': (2,)}


def test_optional_values_are_tried_in_order():
  assert config_io._convert(None, int | None, 'x') is None
  assert config_io._convert(3, int | None, 'x') == 3
  with pytest.raises(ValueError, match=r"x='3' must be"):
    config_io._convert('3', int | None, 'x')
