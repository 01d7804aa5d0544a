"""The published names of a small DeepSeek-V3 with multi-token prediction, as our variables."""

import numpy as np

from moe_jax.config import MLAConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from moe_jax.models.grouping import group_layers

# D model  E experts  F width  H heads  N nope width  C rope width  V value width  R latent


def model_config(hf: dict) -> ModelConfig:
  """The config of transformers' `deepseek_v3` as ours."""
  return ModelConfig(
    vocab_size=hf['vocab_size'],
    d_model=hf['hidden_size'],
    num_layers=hf['num_hidden_layers'],
    num_dense_layers=hf['first_k_dense_replace'],
    d_ff=hf['intermediate_size'],
    norm_eps=hf['rms_norm_eps'],
    attention='mla',
    mla=MLAConfig(
      num_heads=hf['num_attention_heads'],
      d_nope=hf['qk_nope_head_dim'],
      d_rope=hf['qk_rope_head_dim'],
      d_value=hf['v_head_dim'],
      kv_rank=hf['kv_lora_rank'],
      q_rank=hf['q_lora_rank'],
    ),
    moe=MoEConfig(
      num_experts=hf['n_routed_experts'],
      top_k=hf['num_experts_per_tok'],
      d_expert=hf['moe_intermediate_size'],
      num_shared=hf['n_shared_experts'],
      num_groups=hf['n_group'],
      top_groups=hf['topk_group'],
      normalize_weights=hf['norm_topk_prob'],
      weight_scale=hf['routed_scaling_factor'],
    ),
    rope=RopeConfig(base=hf['rope_parameters']['rope_theta']),
    mtp=MTPConfig(num_modules=hf['num_nextn_predict_layers']),
  )


def variables(cfg: ModelConfig, w: dict[str, np.ndarray]) -> dict:
  """Arrays named as in goldens/v3_mtp.npz -> {'params': ..., 'router': ...}."""
  params = {
    'embedding_VD': w['w.model.embed_tokens.weight'],
    'head_DV': w['w.lm_head.weight'].T,
    'final_norm': {'weight_D': w['w.model.norm.weight']},
  }
  router, at = {}, 0
  for g, (kinds, repeats) in enumerate(group_layers(cfg.layers)):
    assert len(kinds) == 1 and repeats == sum(k == kinds[0] for k in cfg.layers)
    layers = [_layer(cfg, w, f'w.model.layers.{i}.') for i in range(at, at + repeats)]
    at += repeats
    params[f'group_{g}'] = {'layer_0': _stack([p for p, _ in layers])}
    if kinds[0].feed_forward == 'moe':
      router[f'group_{g}'] = {'layer_0': _stack([r for _, r in layers])}
  for k in range(cfg.mtp.num_modules):
    at = f'mtp.layers.{k}.'
    block, bias = _layer(cfg, w, f'{at}mtp_block.')
    params[f'mtp_{k + 1}'] = {
      'embedding_norm': {'weight_D': w[f'{at}enorm.weight']},
      'previous_norm': {'weight_D': w[f'{at}hnorm.weight']},
      'join_XD': w[f'{at}eh_proj.weight'].T,
      'block': block,
      'final_norm': {'weight_D': w[f'{at}post_norm.weight']},
    }
    router[f'mtp_{k + 1}'] = {'block': bias}
  return {'params': params, 'router': router}


def _stack(trees: list):
  if isinstance(trees[0], dict):
    return {name: _stack([tree[name] for tree in trees]) for name in trees[0]}
  return np.stack(trees)


def _layer(cfg: ModelConfig, w: dict[str, np.ndarray], at: str) -> tuple[dict, dict]:
  c, D = cfg.mla, cfg.d_model
  norm = lambda name: {'weight_D': w[f'{at}{name}.weight']}
  linear = lambda name: w[f'{at}{name}.weight'].T
  up_RHX = linear('self_attn.kv_b_proj').reshape(c.kv_rank, c.num_heads, c.d_nope + c.d_value)
  params: dict = {
    'attention_norm': norm('input_layernorm'),
    'feed_forward_norm': norm('post_attention_layernorm'),
    'attention': {
      'q_down_DQ': linear('self_attn.q_a_proj'),
      'q_norm': norm('self_attn.q_a_layernorm'),
      'q_up_QHX': linear('self_attn.q_b_proj').reshape(c.q_rank, c.num_heads, -1),
      'kv_down_DX': linear('self_attn.kv_a_proj_with_mqa'),
      'kv_norm': norm('self_attn.kv_a_layernorm'),
      'key_up_RHN': up_RHX[..., : c.d_nope],
      'value_up_RHV': up_RHX[..., c.d_nope :],
      'out_HVD': linear('self_attn.o_proj').reshape(c.num_heads, c.d_value, D),
    },
  }

  def feed_forward(name: str) -> dict:
    gate, up, down = (linear(f'{name}.{part}_proj') for part in ('gate', 'up', 'down'))
    return {'gate_DF': gate, 'up_DF': up, 'down_FD': down}

  if f'{at}mlp.gate.weight' not in w:
    return params | {'dense': feed_forward('mlp')}, {}
  gate_up = w[f'{at}mlp.experts.gate_up_proj']
  params['moe'] = {
    'router_DE': linear('mlp.gate'),
    'gate_up_ED2F': np.moveaxis(gate_up.reshape(len(gate_up), 2, -1, D), 3, 1),
    'down_EFD': w[f'{at}mlp.experts.down_proj'].mT,
    'shared': feed_forward('mlp.shared_experts'),
  }
  return params, {'moe': {'bias_E': w[f'{at}mlp.gate.e_score_correction_bias']}}
