"""DeepSeek-V3, R1 and V3.1, model_type `deepseek_v3`. Source: arXiv:2412.19437, transformers."""

import re
from typing import Any

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.interop import moe_16b
from moe_jax.interop.fields import Fields, read_rope, write_rope
from moe_jax.interop.moe_16b import decoder_scopes, read_decoder, read_experts, write_decoder
from moe_jax.interop.table import Rule, Scope
from moe_jax.interop.v2 import mla_rules, read_mla, write_mla

MODEL_TYPE = 'deepseek_v3'
STYLES = ('published', 'packed')

BIAS = (Rule('moe.bias_E', 'mlp.gate.e_score_correction_bias', 'e -> e', collection='router'),)


def scopes(cfg: ModelConfig, style: str) -> list[Scope]:
  return decoder_scopes(cfg, style, attention=mla_rules(cfg), bias=BIAS)


def left_out(cfg: ModelConfig, name: str) -> str:
  layer = re.match(r'model\.layers\.(\d+)\.', name)
  if layer and int(layer[1]) >= cfg.num_layers:
    return 'multi-token prediction'
  return moe_16b.left_out(cfg, name)


def read_config(f: Fields, layer_type: str = 'full_attention') -> ModelConfig:
  f.must('scoring_func', 'sigmoid')
  f.must('topk_method', 'noaux_tc')
  f.must('rope_interleave', True)
  f.ignore('num_nextn_predict_layers')
  moe = MoEConfig(
    score='sigmoid',
    group_score='top2',
    num_groups=f.get('n_group', int),
    top_groups=f.get('topk_group', int),
    normalize_weights=f.get('norm_topk_prob', bool),
    weight_scale=f.get('routed_scaling_factor', float),
    **read_experts(f),
  )
  parts = dict(attention='mla', mla=read_mla(f), moe=moe, rope=read_rope(f))
  return read_decoder(f, layer_type, **parts)


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
    'num_nextn_predict_layers': 0,
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
