"""Random checkpoints of any size, as published, and what the tests look at in them."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy_deepseek import tensor_shapes

from moe_jax.interop.safetensors import INDEX, Plan, Writer, read_folder

GOLDEN = Path(__file__).parents[1] / 'golden'

V1 = dict(
  model_type='deepseek', vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
  num_attention_heads=3, num_key_value_heads=3, n_shared_experts=2, n_routed_experts=6,
  num_experts_per_tok=2, moe_intermediate_size=10, first_k_dense_replace=1, moe_layer_freq=1,
  norm_topk_prob=False, scoring_func='softmax', hidden_act='silu', rms_norm_eps=1e-6,
  rope_theta=10000.0, rope_scaling=None, tie_word_embeddings=False,
)  # fmt: skip
MLA = dict(q_lora_rank=12, kv_lora_rank=14, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=8)
V2 = V1 | MLA | dict(model_type='deepseek_v2', topk_method='greedy', routed_scaling_factor=1.0)
V3 = V1 | MLA | dict(
  model_type='deepseek_v3', scoring_func='sigmoid', topk_method='noaux_tc', n_group=2, topk_group=1,
  norm_topk_prob=True, routed_scaling_factor=2.5, n_shared_experts=1,
)  # fmt: skip
V32 = V3 | dict(model_type='deepseek_v32', index_n_heads=8, index_head_dim=16, index_topk=5)
YARN = dict(type='yarn', factor=40, original_max_position_embeddings=64, beta_fast=32, beta_slow=1)


def random_tensors(config, seed=0):
  """float32, of sizes that leave no term of the model without effect."""
  rng, tensors = np.random.default_rng(seed), {}
  for name, shape in tensor_shapes(config).items():
    noise = rng.standard_normal(shape)
    values = 1 + 0.1 * noise if name.endswith('norm.weight') else 0.15 * noise
    tensors[name] = values.astype(np.float32)
  return tensors


def write(folder, config, tensors, *, shard_bytes=5 * 10**9):
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config))
  plans = {name: Plan(a.dtype, a.shape) for name, a in tensors.items()}
  with Writer(folder, plans, shard_bytes=shard_bytes) as writer:
    for name, a in tensors.items():
      writer.write(name, a)
  return folder


def make(folder, config, seed=0, **options):
  return write(folder, config, random_tensors(config, seed), **options)


def contents(folder):
  """Every tensor's dtype, shape and bytes."""
  tensors = read_folder(folder)
  return {n: (str(t.dtype), t.shape, t.read().tobytes()) for n, t in sorted(tensors.items())}


def as_bfloat16(tensors):
  keep = lambda name: name.endswith('e_score_correction_bias')
  return {n: a if keep(n) else a.astype(ml_dtypes.bfloat16) for n, a in tensors.items()}


__all__ = ['GOLDEN', 'INDEX', 'MLA', 'V1', 'V2', 'V3', 'V32', 'YARN', 'as_bfloat16', 'contents',
           'make',
           'random_tensors', 'write']  # fmt: skip
