"""What is read is written back bit for bit, by every route and in every layout."""

import jax
import numpy as np
import pytest
from checkpoints import (
  GOLDEN,
  INDEX,
  V1,
  V2,
  V3,
  V32,
  as_bfloat16,
  contents,
  make,
  random_tensors,
  write,
)

from moe_jax import interop
from moe_jax import sharding as sh
from moe_jax.interop.export_hf import export_hf
from moe_jax.interop.import_hf import import_hf

CASES = ('moe16b', 'v2_lite', 'v2', 'v3', 'v32')


@pytest.mark.parametrize('case', CASES)
def test_import_then_export_is_bitwise_the_checkpoint(case, tmp_path):
  import_hf(GOLDEN / case, tmp_path / 'ours')
  export_hf(tmp_path / 'ours', tmp_path / 'back')
  assert contents(tmp_path / 'back') == contents(GOLDEN / case)


@pytest.mark.parametrize('case', CASES)
def test_load_then_save_is_bitwise_the_checkpoint(case, tmp_path):
  interop.save(*interop.load(GOLDEN / case), tmp_path / 'saved')
  assert contents(tmp_path / 'saved') == contents(GOLDEN / case)


@pytest.mark.parametrize('case', CASES)
def test_packed_layout_holds_the_same_model(case, tmp_path):
  cfg, variables = interop.load(GOLDEN / case)
  interop.save(cfg, variables, tmp_path / 'packed', packed=True)
  packed = contents(tmp_path / 'packed')
  E, D, I = cfg.moe.num_experts, cfg.d_model, cfg.moe.d_expert
  assert packed['model.layers.1.mlp.experts.gate_up_proj'][1] == (E, 2 * I, D)
  assert packed['model.layers.1.mlp.experts.down_proj'][1] == (E, D, I)
  interop.save(*interop.load(tmp_path / 'packed'), tmp_path / 'back')
  assert contents(tmp_path / 'back') == contents(GOLDEN / case)


def test_packed_gate_rows_come_before_up_rows(tmp_path):
  folder = make(tmp_path / 'a', V3)
  interop.save(*interop.load(folder), tmp_path / 'packed', packed=True)
  tensors, prefix = random_tensors(V3), 'model.layers.1.mlp.experts.'
  both = [
    np.concatenate([tensors[f'{prefix}{e}.{n}_proj.weight'] for n in ('gate', 'up')])
    for e in range(V3['n_routed_experts'])
  ]
  assert contents(tmp_path / 'packed')[f'{prefix}gate_up_proj'][2] == np.stack(both).tobytes()


@pytest.mark.parametrize('config', [V1, V2, V3, V32], ids=['V1', 'V2', 'V3', 'V32'])
def test_bfloat16_checkpoint_comes_back_in_bfloat16_bitwise(config, tmp_path):
  folder = write(tmp_path / 'a', config, as_bfloat16(random_tensors(config)))
  import_hf(folder, tmp_path / 'ours')
  export_hf(tmp_path / 'ours', tmp_path / 'back')
  assert contents(tmp_path / 'back') == contents(folder)


def test_exported_config_json_is_read_as_the_same_model(tmp_path):
  for case in CASES:
    cfg, variables = interop.load(GOLDEN / case)
    interop.save(cfg, variables, tmp_path / case)
    assert interop.load(tmp_path / case)[0] == cfg


def test_shards_with_an_index_hold_the_same_model(tmp_path):
  one, many = make(tmp_path / 'one', V3), make(tmp_path / 'many', V3, shard_bytes=20_000)
  assert (many / INDEX).is_file() and len(list(many.glob('*.safetensors'))) > 2
  import_hf(one, tmp_path / 'a')
  import_hf(many, tmp_path / 'b')
  assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def test_variables_sharded_over_eight_devices_are_those_of_one(tmp_path):
  config = V3 | dict(hidden_size=32, vocab_size=48, num_attention_heads=4, num_key_value_heads=4,
                     n_routed_experts=8, num_hidden_layers=4, kv_lora_rank=16,
                     q_lora_rank=16)  # fmt: skip
  folder = make(tmp_path / 'a', config)
  _, whole = interop.load(folder)
  for shape in ((2, 2, 2), (1, 8, 1), (8, 1, 1)):
    with jax.set_mesh(sh.make_mesh(shape)):
      cfg, split = interop.load(folder)
      experts = split['params']['group_1']['layer_0']['moe']['gate_up_ED2F']
      assert experts.addressable_shards[0].data.size * 8 == experts.size
      jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), split, whole)
      out = tmp_path / '-'.join(map(str, shape))
      interop.save(cfg, split, out)
    assert contents(out) == contents(folder)


def test_biases_of_selection_go_to_their_own_collection(tmp_path):
  _, variables = interop.load(make(tmp_path / 'a', V3))
  bias = random_tensors(V3)['model.layers.1.mlp.gate.e_score_correction_bias']
  np.testing.assert_array_equal(variables['router']['group_1']['layer_0']['moe']['bias_E'][0], bias)


def test_tokenizer_and_token_ids_go_along(tmp_path):
  folder = make(tmp_path / 'a', V3 | dict(bos_token_id=3, max_position_embeddings=777))
  (folder / 'tokenizer.json').write_text('{}')
  import_hf(folder, tmp_path / 'ours')
  export_hf(tmp_path / 'ours', tmp_path / 'back')
  config = (tmp_path / 'back' / 'config.json').read_text()
  assert '"bos_token_id": 3' in config and '"max_position_embeddings": 777' in config
  assert (tmp_path / 'back' / 'tokenizer.json').is_file()


def test_weights_can_be_cast_on_the_way_but_selection_biases_stay(tmp_path):
  folder = make(tmp_path / 'a', V3)
  import_hf(folder, tmp_path / 'ours')
  export_hf(tmp_path / 'ours', tmp_path / 'half', dtype='bfloat16')
  kinds = {name: kind for name, (kind, *_) in contents(tmp_path / 'half').items()}
  assert {k for n, k in kinds.items() if 'bias' not in n} == {'bfloat16'}
  assert {k for n, k in kinds.items() if 'bias' in n} == {'float32'}
