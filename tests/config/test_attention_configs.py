"""Impossible attention settings are refused by the name of their field."""

import pytest

from moe_jax.config import (
  DataConfig,
  DSAConfig,
  MeshConfig,
  MoBAConfig,
  ModelConfig,
  NSAConfig,
  RunConfig,
)
from moe_jax.train.cost import _mean_keys

REFUSED = {
  'model.dsa.d_index': lambda: DSAConfig(d_index=8, d_rope=16),
  'model.dsa.stage': lambda: DSAConfig(stage='dense'),
  'model.dsa.index_top_k': lambda: DSAConfig(index_top_k=0),
  'model.dsa.kv_rank': lambda: DSAConfig(kv_rank=0),
  'model.nsa.num_kv_heads': lambda: NSAConfig(num_heads=4, num_kv_heads=3),
  'model.nsa.select_length': lambda: NSAConfig(select_length=40),
  'model.nsa.compress_length': lambda: NSAConfig(compress_length=24),
  'model.nsa.top_blocks': lambda: NSAConfig(top_blocks=2),
  'model.moba.d_head': lambda: MoBAConfig(d_head=7),
  'model.moba.block_size': lambda: MoBAConfig(block_size=0),
}


@pytest.mark.parametrize('field', REFUSED)
def test_impossible_value_is_refused_by_name(field):
  with pytest.raises(ValueError, match=rf'^{field}='):
    REFUSED[field]()


@pytest.mark.parametrize(
  ('model', 'field'),
  [
    (ModelConfig(attention='dsa', dsa=DSAConfig(num_index_heads=9)), 'dsa.num_index_heads'),
    (ModelConfig(attention='nsa', nsa=NSAConfig(num_kv_heads=1)), 'nsa.num_kv_heads'),
  ],
)
def test_heads_that_do_not_divide_over_the_mesh_are_refused(model, field):
  cfg = RunConfig(model=model, data=DataConfig(batch_size=8), mesh=MeshConfig(model=2))
  with pytest.raises(ValueError, match=rf'^model\.{field}='):
    cfg.check_mesh(2)


def test_mean_keys_counts_half_of_a_short_sequence_and_the_limit_of_a_long_one():
  assert _mean_keys(100, 100) == _mean_keys(100, 200) == 50
  # half of the keys for the first 50 tokens, 50 for the others
  assert _mean_keys(200, 50) == (50 * 25 + 150 * 50) / 200
