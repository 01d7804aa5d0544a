"""What is damaged or not supported is refused in one line, before anything is written."""

import json

import numpy as np
import pytest
from checkpoints import INDEX, V1, V2, V3, YARN, make, random_tensors, write

from moe_jax import interop
from moe_jax.interop.export_hf import export_hf
from moe_jax.interop.import_hf import import_hf, main
from moe_jax.interop.safetensors import SINGLE


def refused(folder, tmp_path, *words):
  """Importing fails with one line that has all the words, and leaves no folder."""
  with pytest.raises(interop.InteropError) as caught:
    import_hf(folder, tmp_path / 'out')
  text = str(caught.value)
  assert '\n' not in text
  for word in words:
    assert word in text, text
  assert not list(tmp_path.glob('out*'))


def changed(tmp_path, change):
  tensors = random_tensors(V3)
  change(tensors)
  return write(tmp_path / 'a', V3, tensors)


def test_missing_tensor_is_named_with_its_shape(tmp_path):
  name = 'model.layers.1.mlp.experts.3.up_proj.weight'
  folder = changed(tmp_path, lambda t: t.pop(name))
  refused(folder, tmp_path, str(folder), name, 'missing', '[10, 24]')


def test_extra_tensor_is_named_with_its_file(tmp_path):
  folder = changed(tmp_path, lambda t: t.update({'model.layers.0.extra': np.ones(3, np.float32)}))
  refused(folder, tmp_path, SINGLE, 'model.layers.0.extra', 'extra', '[3]')


def test_wrong_shape_is_named_with_the_right_one(tmp_path):
  name = 'model.layers.0.self_attn.kv_b_proj.weight'
  folder = changed(tmp_path, lambda t: t.update({name: t[name][:-1]}))
  refused(folder, tmp_path, SINGLE, name, '[53, 14]', '[54, 14]')


def test_transposed_matrix_is_refused(tmp_path):
  name = 'model.layers.1.mlp.gate.weight'
  folder = changed(tmp_path, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
  refused(folder, tmp_path, name, '[24, 6]', '[6, 24]')


def test_truncated_file_is_named_with_the_tensor(tmp_path):
  folder = make(tmp_path / 'a', V3)
  data = (folder / SINGLE).read_bytes()
  (folder / SINGLE).write_bytes(data[:-5])
  refused(folder, tmp_path, SINGLE, 'truncated', 'tensor')
  for length in (0, 4, 100):
    (folder / SINGLE).write_bytes(data[:length])
    refused(folder, tmp_path, SINGLE, 'truncated')


def test_damaged_header_is_refused(tmp_path):
  folder = make(tmp_path / 'a', V3)
  data = bytearray((folder / SINGLE).read_bytes())
  data[8:12] = b'oops'
  (folder / SINGLE).write_bytes(data)
  refused(folder, tmp_path, SINGLE, 'header')


def test_missing_shard_is_named_with_a_tensor_of_it(tmp_path):
  folder = make(tmp_path / 'a', V3, shard_bytes=20_000)
  gone = sorted(folder.glob('*.safetensors'))[1]
  gone.unlink()
  refused(folder, tmp_path, gone.name, 'missing', 'tensor')


def test_index_that_promises_more_than_a_shard_has_is_refused(tmp_path):
  folder = make(tmp_path / 'a', V3, shard_bytes=20_000)
  index = json.loads((folder / INDEX).read_text())
  index['weight_map']['ghost'] = index['weight_map']['model.norm.weight']
  (folder / INDEX).write_text(json.dumps(index))
  refused(folder, tmp_path, 'ghost', INDEX)


def test_folder_without_a_checkpoint_is_refused(tmp_path):
  refused(tmp_path / 'nowhere', tmp_path, 'nowhere')
  (tmp_path / 'empty').mkdir()
  refused(tmp_path / 'empty', tmp_path, 'config.json')
  (tmp_path / 'empty' / 'config.json').write_text(json.dumps(V3))
  refused(tmp_path / 'empty', tmp_path, '.safetensors')


FIELDS = {
  'unknown model_type': (V3 | dict(model_type='llama'), 'model_type="llama"', 'deepseek_v3'),
  'tied embeddings': (V3 | dict(tie_word_embeddings=True), 'tie_word_embeddings=true', 'false'),
  'biased attention': (V3 | dict(attention_bias=True), 'attention_bias=true', 'false'),
  'another activation': (V3 | dict(hidden_act='gelu'), 'hidden_act="gelu"', 'silu'),
  'experts in every second layer': (V3 | dict(moe_layer_freq=2), 'moe_layer_freq=2', '1'),
  'fewer key heads': (V1 | dict(num_key_value_heads=1), 'num_key_value_heads=1', '3'),
  'another score': (V3 | dict(scoring_func='softmax'), 'scoring_func="softmax"', 'sigmoid'),
  'another choice': (V3 | dict(topk_method='greedy'), 'topk_method="greedy"', 'noaux_tc'),
  'V2 that normalises': (V2 | dict(norm_topk_prob=True), 'norm_topk_prob=true', 'false'),
  'linear rope': (V3 | dict(rope_scaling=dict(type='linear', factor=2)), 'rope_scaling', 'yarn'),
  'unknown rope field': (V3 | dict(rope_scaling=dict(YARN, magic=1)), 'rope_scaling', 'magic'),
  'half-split rope': (V3 | dict(rope_interleave=False), 'rope_interleave=false', 'true'),
  'unknown field': (V3 | dict(num_experts_per_tokn=3), 'num_experts_per_tokn=3',
                    'num_experts_per_tok'),
  'missing field': (V3 | dict(kv_lora_rank=None), 'kv_lora_rank', 'missing'),
  'text for a number': (V3 | dict(hidden_size='24'), 'hidden_size="24"', 'int'),
  'another quantisation': (V3 | dict(quantization_config=dict(quant_method='awq')),
                           'quantization_config', 'fp8'),
  'more experts a token than there are': (V3 | dict(num_experts_per_tok=60), 'top_k', '60'),
}  # fmt: skip


@pytest.mark.parametrize('name', FIELDS)
def test_unsupported_config_is_refused_by_name(name, tmp_path):
  config, *words = FIELDS[name]
  folder = make(tmp_path / 'a', V3)
  (folder / 'config.json').write_text(json.dumps(config))
  refused(folder, tmp_path, 'config.json', *words)


def test_fields_that_change_nothing_are_accepted(tmp_path):
  config = V3 | dict(architectures=['X'], torch_dtype='bfloat16', use_cache=True, auto_map={},
                     ep_size=1, attention_dropout=0.0, pretraining_tp=1, seq_aux=True,
                     aux_loss_alpha=0.001, some_new_feature=None, another=False)  # fmt: skip
  folder = make(tmp_path / 'a', config)
  assert interop.load(folder)[0].num_layers == 2


def test_rotary_frequencies_are_ignored(tmp_path):
  name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  folder = changed(tmp_path, lambda t: t.update({name: np.ones(3, np.float32)}))
  import_hf(folder, tmp_path / 'out')


def test_multi_token_prediction_is_left_out_and_said_so(tmp_path, capsys):
  folder = changed(
    tmp_path, lambda t: t.update({'model.layers.2.enorm.weight': np.ones(24, np.float32)})
  )
  assert main([str(folder), str(tmp_path / 'out')]) == 0
  assert capsys.readouterr().out == 'left out: 1 tensors of multi-token prediction\n'


def test_command_line_prints_one_line_and_fails(tmp_path, capsys):
  assert main([str(tmp_path / 'nowhere'), str(tmp_path / 'out')]) == 2
  assert capsys.readouterr().err.startswith('error: ')


def test_a_folder_in_use_is_not_overwritten(tmp_path):
  folder = make(tmp_path / 'a', V3)
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'mine').write_text('x')
  with pytest.raises(interop.InteropError, match='not empty'):
    import_hf(folder, tmp_path / 'out')


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
  folder = make(tmp_path / 'a', V3)

  def fail(*_, **__):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('moe_jax.interop.safetensors._write_all', fail)
  with pytest.raises(OSError, match='No space'):
    import_hf(folder, tmp_path / 'out')
  assert not list(tmp_path.glob('out*'))


def test_bias_that_a_softmax_generation_cannot_hold_is_refused(tmp_path):
  cfg, variables = interop.load(make(tmp_path / 'a', V2))
  bias = variables['router']['group_1']['layer_0']['moe']
  bias['bias_E'] = bias['bias_E'] + 1
  with pytest.raises(interop.InteropError, match='selection bias'):
    interop.save(cfg, variables, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_variables_of_another_config_are_refused(tmp_path):
  cfg, _ = interop.load(make(tmp_path / 'a', V3))
  _, other = interop.load(make(tmp_path / 'b', V3 | dict(vocab_size=51)))
  with pytest.raises(interop.InteropError, match='embedding_VD should be'):
    interop.save(cfg, other, tmp_path / 'out')


def test_export_from_a_folder_that_is_no_model_is_refused(tmp_path):
  with pytest.raises(interop.InteropError, match='neither a workdir'):
    export_hf(tmp_path, tmp_path / 'out')


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
  folder = make(tmp_path / 'a', V3)
  with pytest.raises(ValueError, match='vocabulary'):
    interop.logits(folder, [[50]])
