"""DeepSeekMoE-16B, model_type `deepseek`. Source: arXiv:2401.06066 and the hub's modeling code."""

from typing import Any

from moe_jax.config import FullAttentionConfig, ModelConfig, MoEConfig
from moe_jax.interop import ahead
from moe_jax.interop.fields import Fields, read_rope, write_rope
from moe_jax.interop.table import Rule, Scope, layers

# d model  h heads  c head width  f width  v vocabulary  e experts

MODEL_TYPE = 'deepseek'
STYLES = ('published', 'packed')

TOP = (
  Rule('embedding_VD', 'model.embed_tokens.weight', 'v d -> v d'),
  Rule('final_norm.weight_D', 'model.norm.weight', 'd -> d'),
  Rule('head_DV', 'lm_head.weight', 'v d -> d v'),
)
NORMS = (
  Rule('attention_norm.weight_D', 'input_layernorm.weight', 'd -> d'),
  Rule('feed_forward_norm.weight_D', 'post_attention_layernorm.weight', 'd -> d'),
)
DENSE = (
  Rule('dense.gate_DF', 'mlp.gate_proj.weight', 'f d -> d f'),
  Rule('dense.up_DF', 'mlp.up_proj.weight', 'f d -> d f'),
  Rule('dense.down_FD', 'mlp.down_proj.weight', 'd f -> f d'),
)
SHARED = (
  Rule('moe.shared.gate_DF', 'mlp.shared_experts.gate_proj.weight', 'f d -> d f'),
  Rule('moe.shared.up_DF', 'mlp.shared_experts.up_proj.weight', 'f d -> d f'),
  Rule('moe.shared.down_FD', 'mlp.shared_experts.down_proj.weight', 'd f -> f d'),
)
EXPERTS = {
  'published': (
    Rule('moe.gate_up_ED2F[e, :, 0]', 'mlp.experts.{e}.gate_proj.weight', 'f d -> d f'),
    Rule('moe.gate_up_ED2F[e, :, 1]', 'mlp.experts.{e}.up_proj.weight', 'f d -> d f'),
    Rule('moe.down_EFD[e]', 'mlp.experts.{e}.down_proj.weight', 'd f -> f d'),
  ),
  'packed': (
    Rule('moe.gate_up_ED2F[e]', 'mlp.experts.gate_up_proj[e]', '(two f) d -> d two f'),
    Rule('moe.down_EFD[e]', 'mlp.experts.down_proj[e]', 'd f -> f d'),
  ),
}
ROUTER = (Rule('moe.router_DE', 'mlp.gate.weight', 'e d -> d e'),)
# softmax routers have no selection bias: ours is zero, and must be to be written
NO_BIAS = (Rule('moe.bias_E', '', collection='router'),)
ATTENTION = (
  Rule('attention.q_DHC', 'self_attn.q_proj.weight', '(h c) d -> d h c'),
  Rule('attention.k_DHC', 'self_attn.k_proj.weight', '(h c) d -> d h c'),
  Rule('attention.v_DHC', 'self_attn.v_proj.weight', '(h c) d -> d h c'),
  Rule('attention.out_HCD', 'self_attn.o_proj.weight', 'd (h c) -> h c d'),
)


def scopes(cfg: ModelConfig, style: str) -> list[Scope]:
  return decoder_scopes(cfg, style, attention=ATTENTION, bias=NO_BIAS)


def decoder_scopes(
  cfg: ModelConfig, style: str, *, attention: tuple[Rule, ...], bias: tuple[Rule, ...]
) -> list[Scope]:
  """What V1 to V3 share: all but the attention and the selection bias."""
  found = [Scope('', (), '', TOP[:1])]
  for number, ours, repeat in layers(cfg):
    rules = layer_rules(cfg, cfg.layers[number].feed_forward, style, attention=attention, bias=bias)
    found.append(Scope(ours, (repeat,), f'model.layers.{number}.', rules))
  return [*found, Scope('', (), '', TOP[1:])]


def layer_rules(
  cfg: ModelConfig,
  feed_forward: str,
  style: str,
  *,
  attention: tuple[Rule, ...],
  bias: tuple[Rule, ...],
) -> tuple[Rule, ...]:
  if feed_forward == 'dense':
    return (*NORMS, *attention, *DENSE)
  shared = SHARED if cfg.moe.num_shared else ()
  return (*NORMS, *attention, *ROUTER, *bias, *EXPERTS[style], *shared)


def copies(cfg: ModelConfig, style: str) -> list[Scope]:
  return []


def is_ahead(cfg: ModelConfig, name: str) -> bool:
  return False


def left_out(cfg: ModelConfig, name: str) -> str:
  return 'rotary frequencies' if name.endswith('rotary_emb.inv_freq') else ''


def read_config(f: Fields) -> ModelConfig:
  heads, D = f.get('num_attention_heads', int), f.get('hidden_size', int)
  f.must('num_key_value_heads', heads)
  f.must('scoring_func', 'softmax')
  d_head = f.get('head_dim', int, D // max(heads, 1))
  moe = MoEConfig(
    score='softmax',
    group_score='max',
    normalize_weights=f.get('norm_topk_prob', bool, False),
    **read_experts(f),
  )
  attention = FullAttentionConfig(num_heads=heads, d_head=d_head)
  rope = read_rope(f)
  if rope.yarn_factor > 1:
    raise f.fail('rope_scaling', 'is not supported: it should be null for this model_type.')
  return read_decoder(f, attention='full', full=attention, moe=moe, rope=rope)


def read_experts(f: Fields) -> dict[str, Any]:
  return dict(
    num_experts=f.get('n_routed_experts', int),
    top_k=f.get('num_experts_per_tok', int),
    d_expert=f.get('moe_intermediate_size', int),
    num_shared=f.get('n_shared_experts', int, 0),
  )


def read_decoder(f: Fields, layer_type: str = 'full_attention', **parts: Any) -> ModelConfig:
  """The fields of every generation, with the parts that differ."""
  f.must('hidden_act', 'silu')
  f.must('attention_bias', False)
  f.must('mlp_bias', False)
  f.must('tie_word_embeddings', False)
  f.must('moe_layer_freq', 1)
  num_layers = f.get('num_hidden_layers', int)
  num_dense = min(f.get('first_k_dense_replace', int, 0), num_layers)
  kinds = ['dense'] * num_dense + ['sparse'] * (num_layers - num_dense)
  f.must('mlp_layer_types', kinds)
  f.must('layer_types', [layer_type] * num_layers)
  std = f.get('initializer_range', float, 0.02)
  return ModelConfig(
    vocab_size=f.get('vocab_size', int),
    d_model=f.get('hidden_size', int),
    num_layers=num_layers,
    num_dense_layers=num_dense,
    d_ff=f.get('intermediate_size', int),
    norm_eps=f.get('rms_norm_eps', float, 1e-6),
    init_std=std if std > 0 else 0.02,
    **parts,
  )


def write_config(cfg: ModelConfig) -> dict[str, Any]:
  return {
    'architectures': ['DeepseekForCausalLM'],
    **write_decoder(cfg, heads=cfg.full.num_heads),
    'scoring_func': 'softmax',
    'norm_topk_prob': cfg.moe.normalize_weights,
    **write_rope(cfg.rope),
  }


def write_decoder(cfg: ModelConfig, *, heads: int) -> dict[str, Any]:
  longest = round(cfg.rope.yarn_factor * cfg.rope.yarn_original_length)
  return {
    'vocab_size': cfg.vocab_size,
    'hidden_size': cfg.d_model,
    'num_hidden_layers': cfg.num_layers,
    'first_k_dense_replace': cfg.num_dense_layers,
    'moe_layer_freq': 1,
    'intermediate_size': cfg.d_ff,
    'moe_intermediate_size': cfg.moe.d_expert,
    'n_routed_experts': cfg.moe.num_experts,
    'num_experts_per_tok': cfg.moe.top_k,
    'n_shared_experts': cfg.moe.num_shared or None,
    'num_attention_heads': heads,
    'num_key_value_heads': heads,
    'max_position_embeddings': longest,
    **write_common(cfg),
  }


def write_common(cfg: ModelConfig) -> dict[str, Any]:
  """What V4's config.json says in the same words."""
  return {
    'hidden_act': 'silu',
    'attention_bias': False,
    'tie_word_embeddings': False,
    'rms_norm_eps': cfg.norm_eps,
    'initializer_range': cfg.init_std,
    'use_cache': True,
  }


def objection(cfg: ModelConfig) -> str:
  if other := {layer.attention for layer in cfg.layers} - {'full'}:
    return f'its attention should be full, not {", ".join(sorted(other))}'
  if cfg.moe.score != 'softmax':
    return f'moe.score should be softmax, not {cfg.moe.score}'
  if cfg.full.num_heads * cfg.full.d_head != cfg.d_model:
    return 'full.num_heads * full.d_head should be d_model'
  if cfg.moe.top_groups != cfg.moe.num_groups or cfg.moe.weight_scale != 1:
    return 'moe.top_groups should be moe.num_groups, and moe.weight_scale 1'
  if cfg.rope.yarn_factor > 1:
    return 'rope.yarn_factor should be 1'
  return ahead.objection(cfg)
