"""DeepSeek-V2 and V2-Lite, model_type `deepseek_v2`. Source: arXiv:2405.04434, transformers."""

from typing import Any

from moe_jax.config import MLAConfig, ModelConfig, MoEConfig
from moe_jax.interop import ahead
from moe_jax.interop.fields import Fields, read_rope, write_rope
from moe_jax.interop.moe_16b import (
  NO_BIAS,
  copies,
  decoder_scopes,
  is_ahead,
  left_out,
  read_decoder,
  read_experts,
  write_decoder,
)
from moe_jax.interop.table import Rule, Scope

# d model  h heads  n nope width  r key-value latent  q query latent  x a width cut in parts

MODEL_TYPE = 'deepseek_v2'
STYLES = ('published', 'packed')

__all__ = [
  'MODEL_TYPE', 'STYLES', 'copies', 'is_ahead', 'left_out', 'objection', 'read_config', 'scopes',
  'write_config',
]  # fmt: skip


def mla_rules(cfg: ModelConfig) -> tuple[Rule, ...]:
  """kv_b_proj has, for each head, N rows of keys and then V of values."""
  N, V = cfg.mla.d_nope, cfg.mla.d_value
  queries = (Rule('attention.q_up_QHX', 'self_attn.q_proj.weight', '(h x) d -> d h x'),)
  if cfg.mla.q_rank:
    queries = (
      Rule('attention.q_down_DQ', 'self_attn.q_a_proj.weight', 'q d -> d q'),
      Rule('attention.q_norm.weight_D', 'self_attn.q_a_layernorm.weight', 'q -> q'),
      Rule('attention.q_up_QHX', 'self_attn.q_b_proj.weight', '(h x) q -> q h x'),
    )
  kv_b = 'self_attn.kv_b_proj.weight'
  return (
    *queries,
    Rule('attention.kv_down_DX', 'self_attn.kv_a_proj_with_mqa.weight', 'x d -> d x'),
    Rule('attention.kv_norm.weight_D', 'self_attn.kv_a_layernorm.weight', 'r -> r'),
    Rule('attention.key_up_RHN', kv_b, '(h x) r -> r h x', ('x', 0, N + V)),
    Rule('attention.value_up_RHV', kv_b, '(h x) r -> r h x', ('x', N, N + V)),
    Rule('attention.out_HVD', 'self_attn.o_proj.weight', 'd (h v) -> h v d'),
  )


def scopes(cfg: ModelConfig, style: str) -> list[Scope]:
  return decoder_scopes(cfg, style, attention=mla_rules(cfg), bias=NO_BIAS)


def read_mla(f: Fields) -> MLAConfig:
  heads = f.get('num_attention_heads', int)
  f.must('num_key_value_heads', heads)
  f.ignore('head_dim')  # transformers' name for the width that is rotated
  return MLAConfig(
    num_heads=heads,
    d_nope=f.get('qk_nope_head_dim', int),
    d_rope=f.get('qk_rope_head_dim', int),
    d_value=f.get('v_head_dim', int),
    kv_rank=f.get('kv_lora_rank', int),
    q_rank=f.get('q_lora_rank', int, 0),
  )


def write_mla(cfg: ModelConfig) -> dict[str, Any]:
  c = cfg.mla
  return {
    'qk_nope_head_dim': c.d_nope,
    'qk_rope_head_dim': c.d_rope,
    'v_head_dim': c.d_value,
    'kv_lora_rank': c.kv_rank,
    'q_lora_rank': c.q_rank or None,
  }


def read_config(f: Fields) -> ModelConfig:
  f.must('scoring_func', 'softmax')
  # with true, DeepSeek's code normalises and does not scale, transformers scales alone
  f.must('norm_topk_prob', False)
  f.must('topk_method', 'greedy', 'group_limited_greedy')
  f.ignore('n_group', 'topk_group')
  groups = {}
  if f.get('topk_method', str, 'greedy') == 'group_limited_greedy':
    groups = dict(num_groups=f.get('n_group', int), top_groups=f.get('topk_group', int))
  moe = MoEConfig(
    score='softmax',
    group_score='max',
    normalize_weights=False,
    weight_scale=f.get('routed_scaling_factor', float, 1.0),
    **read_experts(f),
    **groups,
  )
  return read_decoder(f, attention='mla', mla=read_mla(f), moe=moe, rope=read_rope(f))


def write_config(cfg: ModelConfig) -> dict[str, Any]:
  m = cfg.moe
  limited = m.num_groups > 1
  return {
    'architectures': ['DeepseekV2ForCausalLM'],
    **write_decoder(cfg, heads=cfg.mla.num_heads),
    **write_mla(cfg),
    'scoring_func': 'softmax',
    'topk_method': 'group_limited_greedy' if limited else 'greedy',
    'n_group': m.num_groups if limited else None,
    'topk_group': m.top_groups if limited else None,
    'norm_topk_prob': False,
    'routed_scaling_factor': m.weight_scale,
    **write_rope(cfg.rope),
  }


def objection(cfg: ModelConfig) -> str:
  if other := {layer.attention for layer in cfg.layers} - {'mla'}:
    return f'its attention should be mla, not {", ".join(sorted(other))}'
  if cfg.moe.score != 'softmax' or cfg.moe.normalize_weights:
    return 'moe.score should be softmax, and moe.normalize_weights False'
  if cfg.moe.group_score != 'max' and cfg.moe.num_groups > cfg.moe.top_groups:
    return f'moe.group_score should be max, not {cfg.moe.group_score}'
  return ahead.objection(cfg)
