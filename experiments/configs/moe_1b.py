"""A DeepSeek-V3 of 1.03B parameters, 0.31B active, at 4096 tokens: one H100 or H200.

python -m experiments.run --config=experiments/configs/moe_1b.py --workdir=runs/moe_1b

`:synthetic` reads no text, for benchmarks.
"""

import ml_collections

from experiments.configs.base import base, check_argument


def get_config(arg: str = 'text') -> ml_collections.ConfigDict:
  check_argument(arg, 'text', 'synthetic')
  c = base()
  c.steps = 2_000
  c.precision = 'bfloat16'

  c.model.vocab_size = 32_768
  c.model.d_model = 1024
  c.model.num_layers = 12
  c.model.num_dense_layers = 1
  c.model.d_ff = 4096
  c.model.init_std = 0.02
  c.model.remat = 'light'
  c.model.mla = dict(num_heads=16, d_nope=128, d_rope=64, d_value=128, kv_rank=512, q_rank=0)
  c.model.moe.num_experts = 64
  c.model.moe.top_k = 8
  c.model.moe.d_expert = 384
  c.model.moe.num_shared = 2
  c.model.moe.num_groups = 8
  c.model.moe.top_groups = 4
  c.model.moe.weight_scale = 2.5

  c.data.tokenizer = 'deepseek:32768'
  c.data.domains = dict(
    plays=dict(source='plays', weight=0.3, max_megabytes=0.0),
    code=dict(source='code', weight=0.7, max_megabytes=0.0),
  )
  if arg == 'synthetic':
    c.data.domains = dict(noise=dict(source='synthetic', weight=1.0, max_megabytes=0.0))
  c.data.batch_size = 16
  c.data.sequence_length = 4096

  c.optim.lr_peak = 1e-3
  c.optim.warmup_steps = 100
  c.eval.interval_steps = 250
  c.eval.batches = 2
  c.checkpoint.interval_steps = 500
  return c
