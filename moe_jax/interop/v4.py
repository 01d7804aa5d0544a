"""DeepSeek-V4 Flash and Pro, model_type `deepseek_v4`. Source: arXiv:2606.19348, transformers.

Names come in three styles: `published` as on the hub and in DeepSeek's code, `saved` as
transformers' save_pretrained writes them, `packed` as transformers holds them in memory.
"""

from collections.abc import Sequence
from typing import Any

from moe_jax.config import (
  CompressedConfig,
  LayerKind,
  MHCConfig,
  ModelConfig,
  MoEConfig,
  RopeConfig,
)
from moe_jax.interop import ahead
from moe_jax.interop.fields import Fields
from moe_jax.interop.moe_16b import read_experts
from moe_jax.interop.table import Rule, Scope, layers
from moe_jax.models import mtp

# d model  h heads  c head width  q query latent  g groups of heads  r group rank  x a width
# j streams  f expert width  v vocabulary  e experts  k experts a token  m window  t one or three

MODEL_TYPE = 'deepseek_v4'
STYLES = ('published', 'saved', 'packed')

_TYPES = {
  'sliding': 'sliding_attention',
  'csa': 'compressed_sparse_attention',
  'hca': 'heavily_compressed_attention',
}
_KINDS = {name: kind for kind, name in _TYPES.items()}

# our leaf, the published name, transformers' name in memory, how axes correspond
Row = tuple[str, str, str, str]
_EMBEDDING: Row = ('embedding_VD', 'embed.weight', 'model.embed_tokens.weight', 'v d -> v d')
_TOP: tuple[Row, ...] = (
  ('leave.fn_JDX', 'hc_head_fn', 'model.hc_head.hc_fn', 'x (j d) -> j d x'),
  ('leave.base_J', 'hc_head_base', 'model.hc_head.hc_base', 'j -> j'),
  ('leave.scale_1', 'hc_head_scale', 'model.hc_head.hc_scale', 't -> t'),
  ('final_norm.weight_D', 'norm.weight', 'model.norm.weight', 'd -> d'),
  ('head_DV', 'head.weight', 'lm_head.weight', 'v d -> d v'),
)
# of a module of multi-token prediction, which transformers does not have: one name for all styles
_MODULE: tuple[Row, ...] = (
  *((ours, f'{there}', f'{there}', axes) for ours, there, _, axes in _TOP[:-1]),
  ('embedding_norm.weight_D', 'enorm.weight', 'enorm.weight', 'd -> d'),
  ('previous_norm.weight_D', 'hnorm.weight', 'hnorm.weight', 'd -> d'),
  ('embedded_DX', 'e_proj.weight', 'e_proj.weight', 'x d -> d x'),
  ('previous_DX', 'h_proj.weight', 'h_proj.weight', 'x d -> d x'),
)
_COPIES = (
  Rule('embedding_VD', 'embed.weight', 'v d -> v d'),
  Rule('head_DV', 'head.weight', 'v d -> d v'),
)
_LAYER: tuple[Row, ...] = (
  ('attention_norm.weight_D', 'attn_norm.weight', 'input_layernorm.weight', 'd -> d'),
  ('feed_forward_norm.weight_D', 'ffn_norm.weight', 'post_attention_layernorm.weight', 'd -> d'),
  ('attention_residual.fn_JDX', 'hc_attn_fn', 'attn_hc.fn', 'x (j d) -> j d x'),
  ('attention_residual.base_X', 'hc_attn_base', 'attn_hc.base', 'x -> x'),
  ('attention_residual.scale_3', 'hc_attn_scale', 'attn_hc.scale', 't -> t'),
  ('feed_forward_residual.fn_JDX', 'hc_ffn_fn', 'ffn_hc.fn', 'x (j d) -> j d x'),
  ('feed_forward_residual.base_X', 'hc_ffn_base', 'ffn_hc.base', 'x -> x'),
  ('feed_forward_residual.scale_3', 'hc_ffn_scale', 'ffn_hc.scale', 't -> t'),
  ('attention.sink_H', 'attn.attn_sink', 'self_attn.sinks', 'h -> h'),
  ('attention.q_down_DQ', 'attn.wq_a.weight', 'self_attn.q_a_proj.weight', 'q d -> d q'),
  ('attention.q_norm.weight_D', 'attn.q_norm.weight', 'self_attn.q_a_norm.weight', 'q -> q'),
  ('attention.q_up_QHC', 'attn.wq_b.weight', 'self_attn.q_b_proj.weight', '(h c) q -> q h c'),
  ('attention.kv_DC', 'attn.wkv.weight', 'self_attn.kv_proj.weight', 'c d -> d c'),
  ('attention.kv_norm.weight_D', 'attn.kv_norm.weight', 'self_attn.kv_norm.weight', 'c -> c'),
  ('attention.out_down_GXR', 'attn.wo_a.weight', 'self_attn.o_a_proj.weight', '(g r) x -> g x r'),
  ('attention.out_up_GRD', 'attn.wo_b.weight', 'self_attn.o_b_proj.weight', 'd (g r) -> g r d'),
  ('moe.router_DE', 'ffn.gate.weight', 'mlp.gate.weight', 'e d -> d e'),
)
_SHARED: tuple[Row, ...] = tuple(
  (f'moe.shared.{ours}', f'ffn.shared_experts.{w}.weight', f'mlp.shared_experts.{name}.weight', p)
  for ours, w, name, p in (
    ('gate_DF', 'w1', 'gate_proj', 'f d -> d f'),
    ('up_DF', 'w3', 'up_proj', 'f d -> d f'),
    ('down_FD', 'w2', 'down_proj', 'd f -> f d'),
  )
)
_INDEXER: tuple[Row, ...] = (
  (
    'attention.indexer.q_QHC',
    'attn.indexer.wq_b.weight',
    'self_attn.compressor.indexer.q_b_proj.weight',
    '(h c) q -> q h c',
  ),
  (
    'attention.indexer.weight_DH',
    'attn.indexer.weights_proj.weight',
    'self_attn.compressor.indexer.scorer.weights_proj.weight',
    'h d -> d h',
  ),
)
_EXPERTS = (
  Rule('moe.gate_up_ED2F[e, :, 0]', 'ffn.experts.{e}.w1.weight', 'f d -> d f'),
  Rule('moe.gate_up_ED2F[e, :, 1]', 'ffn.experts.{e}.w3.weight', 'f d -> d f'),
  Rule('moe.down_EFD[e]', 'ffn.experts.{e}.w2.weight', 'd f -> f d'),
)
_PACKED_EXPERTS = (
  Rule('moe.gate_up_ED2F[e]', 'mlp.experts.gate_up_proj[e]', '(two f) d -> d two f'),
  Rule('moe.down_EFD[e]', 'mlp.experts.down_proj[e]', 'd f -> f d'),
)


def _compressor(ours: str, published: str, packed: str) -> tuple[Row, ...]:
  return (
    (f'{ours}.content_DX', f'{published}.wkv.weight', f'{packed}.kv_proj.weight', 'x d -> d x'),
    (f'{ours}.gate_DX', f'{published}.wgate.weight', f'{packed}.gate_proj.weight', 'x d -> d x'),
    (f'{ours}.bias_MX', f'{published}.ape', f'{packed}.position_bias', 'm x -> m x'),
    (f'{ours}.norm.weight_D', f'{published}.norm.weight', f'{packed}.kv_norm.weight', 'c -> c'),
  )


def _rules(rows: Sequence[Row], style: str) -> tuple[Rule, ...]:
  def name(published: str, packed: str) -> str:
    if style == 'saved' and published == 'attn.kv_norm.weight':
      return 'attn.norm.weight'
    return packed if style == 'packed' else published

  return tuple(Rule(ours, name(there, packed), axes) for ours, there, packed, axes in rows)


def scopes(cfg: ModelConfig, style: str) -> list[Scope]:
  # save_pretrained renames what is in layers, and the head
  top = 'packed' if style == 'saved' else style
  head = _rules(_TOP[-1:], style)
  found = [Scope('', (), '', _rules([_EMBEDDING], top))]
  for number, ours, repeat in layers(cfg):
    theirs = f'layers.{number}.' if style == 'published' else f'model.layers.{number}.'
    rules = layer_rules(cfg, cfg.layers[number], style)
    found.append(Scope(ours, (repeat,), theirs, rules))
  found += [Scope('', (), '', _rules(_TOP[:-1], top)), Scope('', (), '', head)]
  for name, theirs in _modules(cfg, style):
    rules = layer_rules(cfg, mtp.layer(cfg), style)
    found.append(Scope(f'{name}.', (), theirs, _rules(_MODULE, 'published')))
    found.append(Scope(f'{name}.block.', (), theirs, rules))
  return found


def copies(cfg: ModelConfig, style: str) -> list[Scope]:
  return [Scope('', (), theirs, _COPIES) for _, theirs in _modules(cfg, style)]


def _modules(cfg: ModelConfig, style: str) -> list[tuple[str, str]]:
  """Our name of each module and what its tensors' names begin with."""
  first = '' if style == 'published' else 'model.'
  return [(name, f'{first}mtp.{k}.') for k, name in enumerate(mtp.names(cfg))]


def layer_rules(cfg: ModelConfig, kind: LayerKind, style: str) -> tuple[Rule, ...]:
  rows = [*_LAYER, *(_SHARED if cfg.moe.num_shared else ())]
  if kind.attention != 'sliding':
    rows += _compressor('attention.compressor', 'attn.compressor', 'self_attn.compressor')
  if kind.attention == 'csa':
    rows += _INDEXER
    rows += _compressor(
      'attention.indexer.compressor',
      'attn.indexer.compressor',
      'self_attn.compressor.indexer',
    )
  gate = 'mlp.gate.' if style == 'packed' else 'ffn.gate.'
  bias = 'e_score_correction_bias' if style == 'packed' else 'bias'
  router = Rule('moe.bias_E', gate + bias, 'e -> e', collection='router')
  if kind.feed_forward == 'moe_hash':
    router = Rule('moe.expert_VK', f'{gate}tid2eid', 'v k -> v k', collection='router')
  experts = _PACKED_EXPERTS if style == 'packed' else _EXPERTS
  return (*_rules(rows, style), router, *experts)


def is_ahead(cfg: ModelConfig, name: str) -> bool:
  return name.startswith(('mtp.', 'model.mtp.'))


def left_out(cfg: ModelConfig, name: str) -> str:
  if not is_ahead(cfg, name):
    return ''
  if int(name.removeprefix('model.').split('.')[1]) >= cfg.mtp.num_modules:
    return 'multi-token prediction'
  copied = name.removeprefix('model.').split('.', 2)[2] in {rule.tensor for rule in _COPIES}
  return ahead.COPIES if copied else ''


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
    'hidden_act': 'silu',
    'attention_bias': False,
    'tie_word_embeddings': False,
    'rms_norm_eps': cfg.norm_eps,
    'initializer_range': cfg.init_std,
    'use_cache': True,
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
