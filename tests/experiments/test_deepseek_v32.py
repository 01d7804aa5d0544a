"""The V3.2 config has the published sizes, and its miniature trains."""

import functools

import jax
import pytest

from experiments.configs.deepseek import v32
from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.config import RunConfig
from moe_jax.train import cost
from moe_jax.train.state import create


def counts(cfg: RunConfig):
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    state = jax.eval_shape(functools.partial(create, cfg), jax.random.key(0))
  return cost.parameters(cfg.model, state.params), state


def test_indexers_are_what_the_published_count_leaves_out():
  parts, _ = counts(config_io.build(v32.get_config().to_dict()))
  assert f'{parts["indexer"].total / 1e9:.2f}' == '0.85'


def test_full_model_attends_to_fewer_keys_than_a_dense_one():
  params = counts(config_io.build(v32.get_config().to_dict()))[1].params
  sparse, dense = (
    cost.flops_per_token(config_io.build(v32.get_config(arg).to_dict()).model, params, 131_072)
    for arg in ('full', 'warmup')
  )
  # scores of 128 heads x 320 with 131072 / 2 keys or about 2048, and 64 x 128 of the indexer
  width = 128 * (128 + 64 + 128)
  keys = 131_072 / 2 - (2048 - 2048**2 / (2 * 131_072))
  assert dense - sparse == pytest.approx(6 * 61 * width * keys, rel=1e-9)


@pytest.mark.parametrize('arg', ['tiny', 'tiny_warmup'])
def test_tiny_configs_keep_ties_at_the_cut_unlikely(arg):
  cfg = config_io.build(v32.get_config(arg).to_dict())
  assert cfg.model.dsa.num_index_heads >= 8
  assert cfg.model.dsa.index_top_k < cfg.data.sequence_length
  assert (cfg.optim.trainable == 'indexer') == (cfg.model.dsa.stage == 'dense_warmup')
  cfg.check_mesh(1)


def test_unknown_argument_is_one_clear_line():
  with pytest.raises(ValueError, match="'huge' is not an argument of this config"):
    v32.get_config('huge')
