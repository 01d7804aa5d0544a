"""DeepSeek-V3.2, model_type `deepseek_v32`: V3 and an indexer in every layer.

Source: arXiv:2512.02556, transformers.
"""

import dataclasses
from typing import Any

from moe_jax.config import DSAConfig, MLAConfig, ModelConfig
from moe_jax.interop import v3
from moe_jax.interop.fields import Fields
from moe_jax.interop.table import Rule, Scope
from moe_jax.interop.v2 import mla_rules

# d model  q query latent  j index heads  i index width

MODEL_TYPE = 'deepseek_v32'
STYLES = v3.STYLES
copies, is_ahead, left_out = v3.copies, v3.is_ahead, v3.left_out

INDEXER = (
  Rule('attention.indexer.query_QJI', 'self_attn.indexer.wq_b.weight', '(j i) q -> q j i'),
  Rule('attention.indexer.key_DI', 'self_attn.indexer.wk.weight', 'i d -> d i'),
  Rule('attention.indexer.k_norm.weight_D', 'self_attn.indexer.k_norm.weight', 'i -> i'),
  Rule('attention.indexer.k_norm.bias_D', 'self_attn.indexer.k_norm.bias', 'i -> i'),
  Rule('attention.indexer.head_DJ', 'self_attn.indexer.weights_proj.weight', 'j d -> d j'),
)


def _as_v3(cfg: ModelConfig) -> ModelConfig:
  """The model without its indexers."""
  shared = {f.name: getattr(cfg.dsa, f.name) for f in dataclasses.fields(MLAConfig)}
  return dataclasses.replace(
    cfg, attention='mla', attention_per_layer=(), mla=MLAConfig(**shared), dsa=DSAConfig()
  )


def scopes(cfg: ModelConfig, style: str) -> list[Scope]:
  return v3.scopes_with((*mla_rules(_as_v3(cfg)), *INDEXER), cfg, style)


def read_config(f: Fields) -> ModelConfig:
  f.get('q_lora_rank', int)  # what the indexer reads: absent in V2-Lite alone
  plain = v3.read_config(f, layer_type='indexed_attention')
  dsa = DSAConfig(
    **dataclasses.asdict(plain.mla),
    num_index_heads=f.get('index_n_heads', int),
    d_index=f.get('index_head_dim', int),
    index_top_k=f.get('index_topk', int),
  )
  return dataclasses.replace(plain, attention='dsa', mla=MLAConfig(), dsa=dsa)


def write_config(cfg: ModelConfig) -> dict[str, Any]:
  c = cfg.dsa
  return v3.write_config(_as_v3(cfg)) | {
    'architectures': ['DeepseekV32ForCausalLM'],
    'index_n_heads': c.num_index_heads,
    'index_head_dim': c.d_index,
    'index_topk': c.index_top_k,
  }


def objection(cfg: ModelConfig) -> str:
  if other := {layer.attention for layer in cfg.layers} - {'dsa'}:
    return f'its attention should be dsa, not {", ".join(sorted(other))}'
  if not cfg.dsa.q_rank:
    return 'dsa.q_rank should be positive'
  return v3.objection(_as_v3(cfg))
