"""DeepSeek-V2-Lite: 15.71B parameters, 2.66B active. `:tiny` has its kinds of layers, small.

python -m experiments.run --config=experiments/configs/deepseek/v2_lite.py:tiny --workdir=runs/tiny

As trained at 4096 tokens; the released model adds YaRN (rope.yarn_factor=40, mscale 0.707).
Source: arXiv:2405.04434, appendix B.
"""

import ml_collections

from experiments.configs.base import base, check_argument
from experiments.configs.deepseek.tiny import shrink


def get_config(arg: str = 'full') -> ml_collections.ConfigDict:
  check_argument(arg, 'full', 'tiny')
  c = base()
  c.steps = 302_000  # 5.7T tokens
  c.precision = 'bfloat16'
  c.balance = 'expert_level'
  c.routing.expert_level.weight = 1e-3

  c.model.vocab_size = 102_400
  c.model.d_model = 2048
  c.model.num_layers = 27
  c.model.num_dense_layers = 1
  c.model.d_ff = 10_944
  c.model.init_std = 0.006
  c.model.remat = 'full'
  c.model.mla = dict(num_heads=16, d_nope=128, d_rope=64, d_value=128, kv_rank=512, q_rank=0)
  c.model.moe.num_experts = 64
  c.model.moe.top_k = 6
  c.model.moe.d_expert = 1408
  c.model.moe.num_shared = 2
  c.model.moe.score = 'softmax'
  c.model.moe.group_score = 'max'
  c.model.moe.normalize_weights = False

  c.data.tokenizer = 'deepseek:102400'
  c.data.batch_size = 4608
  c.data.sequence_length = 4096

  c.optim.lr_peak = 4.2e-4
  c.optim.warmup_steps = 2000
  c.optim.schedule = 'steps'
  c.optim.step_fractions = (0.8, 0.9)
  if arg == 'tiny':
    shrink(c)
  return c
