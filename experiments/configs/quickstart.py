"""A small DeepSeek-V3 on 38 plays and jax's own source code, minutes on a laptop.

python -m experiments.run --config=experiments/configs/quickstart.py --workdir=runs/quickstart
"""

import ml_collections

from experiments.configs.base import base


def get_config() -> ml_collections.ConfigDict:
  c = base()
  c.steps = 200
  c.microbatches = 4
  c.balance = 'loss_free+sequence_wise'
  # 1e-3 is for runs of many thousand steps: here the bias has 200 to find its place
  c.routing.loss_free.rate = 1e-2

  c.model.vocab_size = 4096
  c.model.d_model = 128
  c.model.num_layers = 4
  c.model.num_dense_layers = 1
  c.model.d_ff = 384
  c.model.init_std = 0.02
  c.model.mla = dict(num_heads=4, d_nope=32, d_rope=16, d_value=32, kv_rank=64, q_rank=96)
  c.model.moe.num_experts = 16
  c.model.moe.top_k = 4
  c.model.moe.d_expert = 64
  c.model.moe.num_groups = 4
  c.model.moe.top_groups = 2
  c.model.moe.weight_scale = 2.5

  c.data.tokenizer = 'deepseek:4096'
  c.data.domains = dict(
    plays=dict(source='plays', weight=0.7, max_megabytes=0.0),
    code=dict(source='code', weight=0.3, max_megabytes=4.0),
  )
  c.data.batch_size = 16
  c.data.sequence_length = 256

  c.optim.lr_peak = 2e-3
  c.optim.warmup_steps = 40
  c.eval.interval_steps = 50
  c.checkpoint.interval_steps = 50
  return c
