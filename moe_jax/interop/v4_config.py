"""DeepSeek-V4's config.json, read and written. Source: arXiv:2606.19348, transformers."""

from typing import Any

from moe_jax.config import CompressedConfig, MHCConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.interop import ahead
from moe_jax.interop.fields import Fields
from moe_jax.interop.moe_16b import read_experts, write_common

_TYPES = {
  'sliding': 'sliding_attention',
  'csa': 'compressed_sparse_attention',
  'hca': 'heavily_compressed_attention',
}
_KINDS = {name: kind for kind, name in _TYPES.items()}


def read_config(f: Fields) -> ModelConfig:
  num_layers = f.get('num_hidden_layers', int)
  rates = f.get('compress_rates', dict, {})
  csa = rates.get(_TYPES['csa'], f.get('compress_rate_csa', int, 4))
  hca = rates.get(_TYPES['hca'], f.get('compress_rate_hca', int, 128))
  d_head = f.get('head_dim', int)
  d_rope = f.get('qk_rope_head_dim', int, 0)
  partial = f.get('partial_rotary_factor', float, d_rope / d_head)
  main, compress = _read_ropes(f)
  compressed = CompressedConfig(
    num_heads=f.get('num_attention_heads', int),
    d_head=d_head,
    d_rope=d_rope or int(d_head * partial),
    q_rank=f.get('q_lora_rank', int),
    window=f.get('sliding_window', int),
    num_groups=f.get('o_groups', int),
    group_rank=f.get('o_lora_rank', int),
    csa_ratio=csa,
    hca_ratio=hca,
    num_index_heads=f.get('index_n_heads', int),
    d_index=f.get('index_head_dim', int),
    index_top_k=f.get('index_topk', int),
    rope=compress,
  )
  for name, only in (
    ('scoring_func', 'sqrtsoftplus'), ('hidden_act', 'silu'), ('num_key_value_heads', 1),
    ('attention_bias', False), ('mlp_bias', False), ('tie_word_embeddings', False),
    ('topk_method', 'noaux_tc'),
  ):  # fmt: skip
    f.must(name, only)
  moe = MoEConfig(
    score='sqrt_softplus',
    normalize_weights=f.get('norm_topk_prob', bool, True),
    weight_scale=f.get('routed_scaling_factor', float, 1.0),
    num_hash_layers=_read_num_hash_layers(f, num_layers),
    swiglu_limit=f.get('swiglu_limit', float, 0.0),
    **read_experts(f),
  )
  std = f.get('initializer_range', float, 0.02)
  return ModelConfig(
    vocab_size=f.get('vocab_size', int),
    d_model=f.get('hidden_size', int),
    num_layers=num_layers,
    num_dense_layers=0,
    attention='csa',
    attention_per_layer=_read_kinds(f, num_layers),
    residual='mhc',
    norm_eps=f.get('rms_norm_eps', float, 1e-6),
    init_std=std if std > 0 else 0.02,
    compressed=compressed,
    mhc=MHCConfig(
      num_streams=f.get('hc_mult', int, 4),
      sinkhorn_iterations=f.get('hc_sinkhorn_iters', int, 20),
      eps=f.get('hc_eps', float, 1e-6),
    ),
    moe=moe,
    rope=main,
    mtp=ahead.read_modules(f),
  )


def _read_kinds(f: Fields, num_layers: int) -> tuple[str, ...]:
  """layer_types, or the hub's compress_ratios, which also count the prediction module's layer."""
  f.ignore('layer_types', 'compress_ratios')
  types, ratios = f.values.get('layer_types'), f.values.get('compress_ratios')
  if types is not None:
    if len(types) != num_layers or not set(types) <= set(_KINDS):
      raise f.fail('layer_types', f'should be {num_layers} of {", ".join(_KINDS)}.')
    return tuple(_KINDS[name] for name in types)
  known = {0: 'sliding', 4: 'csa', 128: 'hca'}
  if ratios is None or len(ratios) < num_layers or not set(ratios) <= set(known):
    raise f.fail('compress_ratios', f'should be at least {num_layers} of 0, 4 and 128.')
  return tuple(known[ratio] for ratio in ratios[:num_layers])


def _read_num_hash_layers(f: Fields, num_layers: int) -> int:
  f.ignore('mlp_layer_types')
  types = f.values.get('mlp_layer_types')
  if types is None:
    return min(f.get('num_hash_layers', int, 3), num_layers)
  f.ignore('num_hash_layers')
  count = types.count('hash_moe')
  if types != ['hash_moe'] * count + ['moe'] * (num_layers - count):
    raise f.fail('mlp_layer_types', f'should be hash_moe and then moe, {num_layers} in all.')
  return count


def _read_ropes(f: Fields) -> tuple[RopeConfig, RopeConfig]:
  """Of sliding layers, and of layers with entries; only the latter have YaRN."""
  f.ignore('rope_scaling', 'rope_parameters')
  new, old = f.values.get('rope_parameters') or {}, f.values.get('rope_scaling') or {}
  nested = 'main' in new or 'compress' in new
  main = new.get('main', {}) if nested else {}
  compress = new.get('compress', {}) if nested else (new or old)
  base = float(main.get('rope_theta', f.get('rope_theta', float, 10_000.0)))
  theta = f.get('compress_rope_theta', float, 160_000.0)
  if nested:
    theta = float(compress.get('rope_theta', theta))
  if main.get('rope_type', 'default') != 'default':
    raise f.fail('rope_parameters', 'should have a "main" of type "default".')
  kind = compress.get('rope_type', compress.get('type', 'default'))
  if kind == 'default':
    return RopeConfig(base=base), RopeConfig(base=theta)
  length = compress.get('original_max_position_embeddings')
  # attention_factor is not read: no V4 code applies it
  if kind != 'yarn' or not length or compress.get('factor', 0) < 1:
    raise f.fail(
      'rope_parameters' if new else 'rope_scaling',
      'should be of type "yarn" with a factor and original_max_position_embeddings.',
    )
  return RopeConfig(base=base), RopeConfig(
    base=theta,
    yarn_factor=float(compress['factor']),
    yarn_original_length=length,
    yarn_beta_fast=float(compress.get('beta_fast') or 32),
    yarn_beta_slow=float(compress.get('beta_slow') or 1),
  )


def write_config(cfg: ModelConfig) -> dict[str, Any]:
  c, m, kinds = cfg.compressed, cfg.moe, [layer.attention for layer in cfg.layers]
  num_hash = sum(layer.feed_forward == 'moe_hash' for layer in cfg.layers)
  # compress_ratios knows no other ratios, and is what DeepSeek's own code reads
  ratios = {'sliding': 0, 'csa': 4, 'hca': 128}
  own = {'compress_ratios': [ratios[kind] for kind in kinds]}
  scaling = {
    'type': 'yarn',
    'rope_type': 'yarn',
    'factor': c.rope.yarn_factor,
    'original_max_position_embeddings': c.rope.yarn_original_length,
    'beta_fast': c.rope.yarn_beta_fast,
    'beta_slow': c.rope.yarn_beta_slow,
  }
  return {
    'architectures': ['DeepseekV4ForCausalLM'],
    'vocab_size': cfg.vocab_size,
    'hidden_size': cfg.d_model,
    'num_hidden_layers': cfg.num_layers,
    'layer_types': [_TYPES[kind] for kind in kinds],
    **(own if (c.csa_ratio, c.hca_ratio) == (4, 128) else {}),
    'compress_rates': {_TYPES['csa']: c.csa_ratio, _TYPES['hca']: c.hca_ratio},
    'mlp_layer_types': ['hash_moe'] * num_hash + ['moe'] * (cfg.num_layers - num_hash),
    'num_hash_layers': num_hash,
    'moe_intermediate_size': m.d_expert,
    'n_routed_experts': m.num_experts,
    'n_shared_experts': m.num_shared,
    'num_experts_per_tok': m.top_k,
    'scoring_func': 'sqrtsoftplus',
    'norm_topk_prob': m.normalize_weights,
    'routed_scaling_factor': m.weight_scale,
    'swiglu_limit': m.swiglu_limit,
    'num_attention_heads': c.num_heads,
    'num_key_value_heads': 1,
    'head_dim': c.d_head,
    'qk_rope_head_dim': c.d_rope,
    'q_lora_rank': c.q_rank,
    'sliding_window': c.window,
    'o_groups': c.num_groups,
    'o_lora_rank': c.group_rank,
    'index_n_heads': c.num_index_heads,
    'index_head_dim': c.d_index,
    'index_topk': c.index_top_k,
    'hc_mult': cfg.mhc.num_streams,
    'hc_sinkhorn_iters': cfg.mhc.sinkhorn_iterations,
    'hc_eps': cfg.mhc.eps,
    'rope_theta': cfg.rope.base,
    'compress_rope_theta': c.rope.base,
    'rope_scaling': scaling if c.rope.yarn_factor > 1 else None,
    'max_position_embeddings': round(c.rope.yarn_factor * c.rope.yarn_original_length),
    'num_nextn_predict_layers': cfg.mtp.num_modules,
    **write_common(cfg),
  }


def objection(cfg: ModelConfig) -> str:
  if other := {layer.attention for layer in cfg.layers} - set(_TYPES):
    return f'its attention should be sliding, csa or hca, not {", ".join(sorted(other))}'
  if cfg.residual != 'mhc' or cfg.num_dense_layers:
    return 'residual should be mhc, and num_dense_layers 0'
  if cfg.moe.score != 'sqrt_softplus':
    return f'moe.score should be sqrt_softplus, not {cfg.moe.score}'
  if cfg.moe.num_groups != cfg.moe.top_groups or not cfg.moe.num_shared:
    return 'moe.top_groups should be moe.num_groups, and moe.num_shared at least 1'
  if not cfg.moe.swiglu_limit or cfg.rope.yarn_factor > 1:
    return 'moe.swiglu_limit should be positive, and rope.yarn_factor 1'
  return ''
