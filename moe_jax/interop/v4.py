"""DeepSeek-V4 Flash and Pro, model_type `deepseek_v4`. Source: arXiv:2606.19348, transformers.

Names come in three styles: `published` as on the hub and in DeepSeek's code, `saved` as
transformers' save_pretrained writes them, `packed` as transformers holds them in memory.
"""

from collections.abc import Sequence

from moe_jax.config import LayerKind, ModelConfig
from moe_jax.interop import ahead
from moe_jax.interop.table import Rule, Scope, layers
from moe_jax.interop.v4_config import objection, read_config, write_config
from moe_jax.models import mtp

# d model  h heads  c head width  q query latent  g groups of heads  r group rank  x a width
# j streams  f expert width  v vocabulary  e experts  k experts a token  m window  t one or three

__all__ = [  # what `families.Family` asks for
  'MODEL_TYPE',
  'STYLES',
  'copies',
  'is_ahead',
  'left_out',
  'objection',
  'read_config',
  'scopes',
  'write_config',
]

MODEL_TYPE = 'deepseek_v4'
STYLES = ('published', 'saved', 'packed')

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
  *((ours, there, there, axes) for ours, there, _, axes in _TOP[:-1]),
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
