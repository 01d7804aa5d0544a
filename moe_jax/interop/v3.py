"""DeepSeek-V3, R1 and V3.1, model_type `deepseek_v3`. Source: arXiv:2412.19437, transformers."""

import re
from typing import Any

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.interop import ahead, moe_16b
from moe_jax.interop.fields import Fields, read_rope, write_rope
from moe_jax.interop.moe_16b import (
  decoder_scopes,
  layer_rules,
  read_decoder,
  read_experts,
  write_decoder,
)
from moe_jax.interop.table import Rule, Scope
from moe_jax.interop.v2 import mla_rules, read_mla, write_mla
from moe_jax.models import mtp

MODEL_TYPE = 'deepseek_v3'
STYLES = ('published', 'packed')

BIAS = (Rule('moe.bias_E', 'mlp.gate.e_score_correction_bias', 'e -> e', collection='router'),)
# of a module of multi-token prediction, which stands behind the layers as one more; x twice d
MODULE = (
  Rule('embedding_norm.weight_D', 'enorm.weight', 'd -> d'),
  Rule('previous_norm.weight_D', 'hnorm.weight', 'd -> d'),
  Rule('join_XD', 'eh_proj.weight', 'd x -> x d'),
  Rule('final_norm.weight_D', 'shared_head.norm.weight', 'd -> d'),
)
COPIES = (
  Rule('embedding_VD', 'embed_tokens.weight', 'v d -> v d'),
  Rule('head_DV', 'shared_head.head.weight', 'v d -> d v'),
)


def scopes(cfg: ModelConfig, style: str) -> list[Scope]:
  return scopes_with(mla_rules(cfg), cfg, style)


def scopes_with(attention: tuple[Rule, ...], cfg: ModelConfig, style: str) -> list[Scope]:
  """A V3 model of any attention, its prediction modules included."""
  found = decoder_scopes(cfg, style, attention=attention, bias=BIAS)
  kind = mtp.layer(cfg).feed_forward
  rules = layer_rules(cfg, kind, style, attention=attention, bias=BIAS)
  for name, theirs in _modules(cfg):
    found += [Scope(f'{name}.', (), theirs, MODULE), Scope(f'{name}.block.', (), theirs, rules)]
  return found


def copies(cfg: ModelConfig, style: str) -> list[Scope]:
  return [Scope('', (), theirs, COPIES) for _, theirs in _modules(cfg)]


def _modules(cfg: ModelConfig) -> list[tuple[str, str]]:
  """Our name of each module and what its tensors' names begin with."""
  names = enumerate(mtp.names(cfg), start=cfg.num_layers)
  return [(name, f'model.layers.{number}.') for number, name in names]


def is_ahead(cfg: ModelConfig, name: str) -> bool:
  layer = re.match(r'model\.layers\.(\d+)\.', name)
  return bool(layer) and int(layer[1]) >= cfg.num_layers


def left_out(cfg: ModelConfig, name: str) -> str:
  if is_ahead(cfg, name):
    if not name.startswith(tuple(theirs for _, theirs in _modules(cfg))):
      return 'multi-token prediction'
    if name.endswith(tuple(f'.{rule.tensor}' for rule in COPIES)):
      return ahead.COPIES
  return moe_16b.left_out(cfg, name)


def read_config(f: Fields, layer_type: str = 'full_attention') -> ModelConfig:
  f.must('scoring_func', 'sigmoid')
  f.must('topk_method', 'noaux_tc')
  f.must('rope_interleave', True)
  moe = MoEConfig(
    score='sigmoid',
    group_score='top2',
    num_groups=f.get('n_group', int),
    top_groups=f.get('topk_group', int),
    normalize_weights=f.get('norm_topk_prob', bool),
    weight_scale=f.get('routed_scaling_factor', float),
    **read_experts(f),
  )
  parts = dict(mla=read_mla(f), moe=moe, rope=read_rope(f), mtp=ahead.read_modules(f))
  return read_decoder(f, layer_type, attention='mla', **parts)


def write_config(cfg: ModelConfig) -> dict[str, Any]:
  m = cfg.moe
  return {
    'architectures': ['DeepseekV3ForCausalLM'],
    **write_decoder(cfg, heads=cfg.mla.num_heads),
    **write_mla(cfg),
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'n_group': m.num_groups,
    'topk_group': m.top_groups,
    'norm_topk_prob': m.normalize_weights,
    'routed_scaling_factor': m.weight_scale,
    'num_nextn_predict_layers': cfg.mtp.num_modules,
    **write_rope(cfg.rope),
  }


def objection(cfg: ModelConfig) -> str:
  if other := {layer.attention for layer in cfg.layers} - {'mla'}:
    return f'its attention should be mla, not {", ".join(sorted(other))}'
  if cfg.moe.score != 'sigmoid':
    return f'moe.score should be sigmoid, not {cfg.moe.score}'
  if cfg.moe.group_score != 'top2' and cfg.moe.num_groups > cfg.moe.top_groups:
    return f'moe.group_score should be top2, not {cfg.moe.group_score}'
  if not cfg.moe.num_shared:
    return 'moe.num_shared should be at least 1'
  return ''
