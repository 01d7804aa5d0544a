"""Every rule of the config refuses in one line that names field, value, rule and remedy."""

import dataclasses
import re

import pytest

from moe_jax.config import (
  CheckpointConfig,
  CompressedConfig,
  DataConfig,
  DomainConfig,
  EvalConfig,
  FullAttentionConfig,
  GuardConfig,
  LogConfig,
  MeshConfig,
  MHCConfig,
  MLAConfig,
  ModelConfig,
  MoEConfig,
  OptimConfig,
  PrecisionOverrides,
  RopeConfig,
  RunConfig,
  SampleConfig,
)

# field=value rule. Remedy.
FORM = re.compile(r'(?P<field>[\w.*]+)=(?P<value>.+?) [a-z(].*\. [A-Z].*\.')

RULES = [
  # (kind, fields, field named, value shown, words of the rule)
  (RopeConfig, dict(base=0.0), 'model.rope.base', '0.0', 'must be positive'),
  (RopeConfig, dict(yarn_factor=0.5), 'model.rope.yarn_factor', '0.5', 'at least 1'),
  (RopeConfig, dict(yarn_original_length=0), 'model.rope.yarn_original_length', '0', 'positive'),
  (FullAttentionConfig, dict(num_heads=0), 'model.full.num_heads', '0', 'positive'),
  (FullAttentionConfig, dict(d_head=7), 'model.full.d_head', '7', 'must be even'),
  (MLAConfig, dict(d_rope=5), 'model.mla.d_rope', '5', 'must be even'),
  (MLAConfig, dict(kv_rank=0), 'model.mla.kv_rank', '0', 'positive'),
  (MLAConfig, dict(q_rank=-1), 'model.mla.q_rank', '-1', 'not be negative'),
  (MoEConfig, dict(top_k=17), 'model.moe.top_k', '17', 'num_experts=16'),
  (MoEConfig, dict(top_k=0), 'model.moe.top_k', '0', 'positive'),
  (MoEConfig, dict(num_shared=-1), 'model.moe.num_shared', '-1', 'not be negative'),
  (MoEConfig, dict(score='relu'), 'model.moe.score', "'relu'", 'softmax, sigmoid'),
  (MoEConfig, dict(group_score='min'), 'model.moe.group_score', "'min'", 'max, top2'),
  (MoEConfig, dict(num_groups=3), 'model.moe.num_groups', '3', 'must divide num_experts=16'),
  (MoEConfig, dict(num_groups=4, top_groups=5), 'model.moe.top_groups', '5', 'num_groups=4'),
  (MoEConfig, dict(num_groups=8, top_groups=1), 'model.moe.top_k', '4', 'exceeds the 2 experts'),
  (
    MoEConfig,
    dict(num_groups=16, top_groups=4),
    'model.moe.group_score',
    "'top2'",
    'at least 2 experts in a group, not 1',
  ),
  (MoEConfig, dict(num_hash_layers=-1), 'model.moe.num_hash_layers', '-1', 'not be negative'),
  (MoEConfig, dict(swiglu_limit=-1.0), 'model.moe.swiglu_limit', '-1.0', 'not be negative'),
  (CompressedConfig, dict(d_rope=7), 'model.compressed.d_rope', '7', 'must be even'),
  (CompressedConfig, dict(num_groups=3), 'model.compressed.num_groups', '3', 'num_heads=4'),
  (CompressedConfig, dict(index_top_k=0), 'model.compressed.index_top_k', '0', 'positive'),
  (CompressedConfig, dict(stage='warm'), 'model.compressed.stage', "'warm'", 'dense_warmup'),
  (MHCConfig, dict(num_streams=0), 'model.mhc.num_streams', '0', 'positive'),
  (ModelConfig, dict(residual='none'), 'model.residual', "'none'", 'plain, mhc'),
  (
    ModelConfig,
    dict(moe=MoEConfig(num_hash_layers=4)),
    'model.moe.num_hash_layers',
    '4',
    'exceeds the layers with experts',
  ),
  (ModelConfig, dict(vocab_size=0), 'model.vocab_size', '0', 'positive'),
  (ModelConfig, dict(init_std=0.0), 'model.init_std', '0.0', 'positive'),
  (ModelConfig, dict(attention='flash'), 'model.attention', "'flash'", 'full, mla'),
  (
    ModelConfig,
    dict(attention_per_layer=('mla', 'no', 'mla', 'mla')),
    'model.attention_per_layer',
    "'no'",
    'full, mla',
  ),
  (
    ModelConfig,
    dict(attention_per_layer=('mla',)),
    'model.attention_per_layer',
    "('mla',)",
    'num_layers=4',
  ),
  (ModelConfig, dict(num_dense_layers=5), 'model.num_dense_layers', '5', 'num_layers=4'),
  (ModelConfig, dict(remat='some'), 'model.remat', "'some'", 'none, light, selective, dots, full'),
  (ModelConfig, dict(strict_remat=True), 'model.strict_remat', 'True', 'model.unroll_layers=True'),
  (OptimConfig, dict(lr_peak=0.0), 'optim.lr_peak', '0.0', 'positive'),
  (OptimConfig, dict(schedule='step'), 'optim.schedule', "'step'", 'constant, steps, cosine, wsd'),
  (OptimConfig, dict(warmup_steps=-1), 'optim.warmup_steps', '-1', 'not be negative'),
  (OptimConfig, dict(b2=1.0), 'optim.b2', '1.0', '[0, 1)'),
  (OptimConfig, dict(decay_fraction=0.0), 'optim.decay_fraction', '0.0', '(0, 1]'),
  (OptimConfig, dict(step_fractions=(0.9, 0.8)), 'optim.step_fractions', '(0.9, 0.8)', 'rise'),
  (OptimConfig, dict(step_fractions=(0.5, 1.0)), 'optim.step_fractions', '(0.5, 1.0)', 'rise'),
  (GuardConfig, dict(window=0), 'guard.window', '0', 'positive'),
  (GuardConfig, dict(min_samples=65), 'guard.min_samples', '65', 'window=64'),
  (GuardConfig, dict(max_rollbacks=-1), 'guard.max_rollbacks', '-1', 'not be negative'),
  (DomainConfig, dict(source='x', weight=0.0), 'data.domains.*.weight', '0.0', 'positive'),
  (DomainConfig, dict(source=''), 'data.domains.*.source', "''", 'is empty'),
  (DataConfig, dict(batch_size=0), 'data.batch_size', '0', 'positive'),
  (DataConfig, dict(sequence_length=1), 'data.sequence_length', '1', 'at least 2'),
  (DataConfig, dict(validation_fraction=1.0), 'data.validation_fraction', '1.0', '(0, 1)'),
  (DataConfig, dict(domains={}), 'data.domains', '{}', 'is empty'),
  (MeshConfig, dict(expert=0), 'mesh.expert', '0', 'positive'),
  (MeshConfig, dict(data=0), 'mesh.data', '0', 'positive, or -1'),
  (CheckpointConfig, dict(keep=1), 'checkpoint.keep', '1', 'at least 2'),
  (CheckpointConfig, dict(interval_steps=0), 'checkpoint.interval_steps', '0', 'positive'),
  (EvalConfig, dict(batches=0), 'eval.batches', '0', 'positive'),
  (LogConfig, dict(tracker='mlflow'), 'log.tracker', "'mlflow'", 'none, wandb, trackio'),
  (SampleConfig, dict(top_p=0.0), 'sample.top_p', '0.0', '(0, 1]'),
  (SampleConfig, dict(temperature=-1.0), 'sample.temperature', '-1.0', 'not be negative'),
  (RunConfig, dict(steps=0), 'config.steps', '0', 'positive'),
  (RunConfig, dict(precision='half'), 'config.precision', "'half'", 'float32, bfloat16'),
  (
    RunConfig,
    dict(precision='fp8_block', model=ModelConfig(d_ff=320, moe=MoEConfig(d_expert=96))),
    'model.moe.d_expert',
    '96',
    'must be a multiple of 128',
  ),
  (
    PrecisionOverrides,
    dict(gradients='e5m2'),
    'precision_overrides.gradients',
    "'e5m2'",
    'float32, bfloat16',
  ),
  (RunConfig, dict(microbatches=3), 'microbatches', '3', 'must divide data.batch_size=16'),
]


def assert_refusal(error, field, value, rule):
  text = str(error)
  assert '\n' not in text
  match = FORM.fullmatch(text)
  assert match, text
  assert match['field'] == field
  assert text.startswith(f'{field}={value} ')
  assert rule in text


@pytest.mark.parametrize(
  ('kind', 'fields', 'field', 'value', 'rule'), RULES, ids=[f'{r[2]}={r[3]}' for r in RULES]
)
def test_rule_refuses_and_names_its_field(kind, fields, field, value, rule):
  with pytest.raises(ValueError) as error:
    kind(**fields)
  assert_refusal(error.value, field, value, rule)


@pytest.mark.parametrize('kind', sorted({r[0] for r in RULES}, key=lambda k: k.__name__))
def test_defaults_are_allowed_and_frozen(kind):
  config = kind(**({'source': 'plays'} if kind is DomainConfig else {}))
  field = dataclasses.fields(kind)[0].name
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(config, field, getattr(config, field))


@pytest.mark.parametrize(
  ('mesh', 'devices', 'shape'),
  [
    (dict(), 8, (8, 1, 1)),
    (dict(expert=4), 8, (2, 4, 1)),
    (dict(expert=2, model=2), 8, (2, 2, 2)),
    (dict(data=1), 1, (1, 1, 1)),
  ],
)
def test_mesh_takes_the_devices_that_are_left(mesh, devices, shape):
  assert MeshConfig(**mesh).shape(devices) == shape


@pytest.mark.parametrize(
  ('mesh', 'devices'), [(dict(expert=3), 8), (dict(data=4), 8), (dict(data=2), 1)]
)
def test_mesh_that_does_not_fit_is_refused(mesh, devices):
  with pytest.raises(ValueError) as error:
    MeshConfig(**mesh).shape(devices)
  assert 'mesh=' in str(error.value)
  assert f'does not make {devices}, the number of devices' in str(error.value)


@pytest.mark.parametrize(
  ('fields', 'field', 'value', 'rule'),
  [
    (dict(data=DataConfig(batch_size=12)), 'data.batch_size', '12', 'Use a multiple of 8'),
    (dict(microbatches=4), 'data.batch_size', '16', 'Use a multiple of 32'),
    (
      dict(mesh=MeshConfig(model=8)),
      'model.mla.num_heads',
      '4',
      'must be a multiple of mesh.model=8',
    ),
    (
      dict(mesh=MeshConfig(model=8), model=ModelConfig(attention='full')),
      'model.full.num_heads',
      '4',
      'must be a multiple of mesh.model=8',
    ),
    (
      dict(mesh=MeshConfig(model=4), model=ModelConfig(d_ff=386)),
      'model.d_ff',
      '386',
      'must be a multiple of mesh.model=4',
    ),
    (
      dict(mesh=MeshConfig(expert=8), model=ModelConfig(moe=MoEConfig(num_experts=12))),
      'model.moe.num_experts',
      '12',
      'must be a multiple of mesh.expert=8',
    ),
    (dict(model=ModelConfig(d_model=20)), 'model.d_model', '20', 'must be a multiple of'),
  ],
  ids=['batch', 'microbatch', 'heads', 'full_heads', 'width', 'experts', 'd_model'],
)
def test_sizes_that_do_not_divide_over_eight_devices_are_refused(fields, field, value, rule):
  cfg = RunConfig(**fields)
  with pytest.raises(ValueError) as error:
    cfg.check_mesh(8)
  assert_refusal(error.value, field, value, rule)


def test_sizes_that_divide_over_eight_devices_are_allowed():
  cfg = RunConfig(mesh=MeshConfig(expert=2, model=2))
  assert cfg.check_mesh(8) == (2, 2, 2)
