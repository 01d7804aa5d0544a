"""A DeepSeek-V3 of 136M parameters, 66M active: for comparing precision policies over 2000 steps.

  python -m experiments.compare_precision --config=experiments/configs/precision.py \
      --workdir=runs/precision

`:tiny` is for a test: widths of one block, 20 steps.
"""

import ml_collections

from experiments.configs.base import base, check_argument


def get_config(arg: str = 'full') -> ml_collections.ConfigDict:
  check_argument(arg, 'full', 'tiny')
  c = base()
  c.steps = 2_000
  c.precision = 'bfloat16'
  c.balance = 'loss_free+sequence_wise'

  c.model.vocab_size = 16_384
  c.model.d_model = 640
  c.model.num_layers = 10
  c.model.num_dense_layers = 1
  c.model.d_ff = 1536
  c.model.init_std = 0.02
  c.model.mla = dict(num_heads=5, d_nope=128, d_rope=64, d_value=128, kv_rank=512, q_rank=0)
  c.model.moe.num_experts = 16
  c.model.moe.top_k = 4
  c.model.moe.d_expert = 256
  c.model.moe.num_groups = 4
  c.model.moe.top_groups = 2
  c.model.moe.weight_scale = 2.5

  c.data.tokenizer = 'deepseek:16384'
  c.data.domains = dict(
    plays=dict(source='plays', weight=0.3, max_megabytes=0.0),
    code=dict(source='code', weight=0.7, max_megabytes=0.0),
  )
  c.data.batch_size = 8
  c.data.sequence_length = 1024

  # V2-Lite's rate; at 1e-3 two bfloat16 runs part by 0.5%, twice what is to be seen
  c.optim.lr_peak = 4.2e-4
  c.optim.warmup_steps = 200
  if arg == 'tiny':
    c.steps = 20
    c.model.vocab_size = 264
    c.model.d_model = 128
    c.model.num_layers = 2
    c.model.d_ff = 128
    c.model.mla = dict(num_heads=1, d_nope=64, d_rope=64, d_value=128, kv_rank=128, q_rank=0)
    c.model.moe.update(num_experts=4, top_k=2, d_expert=128, num_groups=1, top_groups=1)
    c.data.tokenizer = 'bytes'
    c.data.domains = dict(plays=dict(source='plays', weight=1.0, max_megabytes=0.2))
    c.data.batch_size = 4
    c.data.sequence_length = 32
    c.optim.warmup_steps = 5
  return c
