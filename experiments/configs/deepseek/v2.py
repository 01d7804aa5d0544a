"""DeepSeek-V2: 235.74B parameters, 21.38B active. `:tiny` has its kinds of layers, small.

python -m experiments.run --config=experiments/configs/deepseek/v2.py:tiny --workdir=runs/tiny

As trained at 4096 tokens. The paper grows the batch from 2304 to 9216 sequences over the first 225B
tokens; here it is 9216 from the start. Of its three balance losses this has the expert-level one.
Source: arXiv:2405.04434, section 3.1.
"""

import ml_collections

from experiments.configs.base import base, check_argument
from experiments.configs.deepseek.tiny import shrink


def get_config(arg: str = 'full') -> ml_collections.ConfigDict:
  check_argument(arg, 'full', 'tiny')
  c = base()
  c.steps = 214_600  # 8.1T tokens
  c.precision = 'bfloat16'
  c.balance = 'expert_level'
  c.routing.expert_level.weight = 3e-3

  c.model.vocab_size = 102_400
  c.model.d_model = 5120
  c.model.num_layers = 60
  c.model.num_dense_layers = 1
  c.model.d_ff = 12_288
  c.model.init_std = 0.006
  c.model.remat = 'full'
  c.model.mla = dict(num_heads=128, d_nope=128, d_rope=64, d_value=128, kv_rank=512, q_rank=1536)
  c.model.moe.num_experts = 160
  c.model.moe.top_k = 6
  c.model.moe.d_expert = 1536
  c.model.moe.num_shared = 2
  c.model.moe.score = 'softmax'
  c.model.moe.num_groups = 8
  c.model.moe.top_groups = 3
  c.model.moe.group_score = 'max'
  c.model.moe.normalize_weights = False
  c.model.moe.weight_scale = 16.0

  c.data.tokenizer = 'deepseek:102400'
  c.data.batch_size = 9216
  c.data.sequence_length = 4096

  c.optim.lr_peak = 2.4e-4
  c.optim.warmup_steps = 2000
  c.optim.schedule = 'steps'
  c.optim.step_fractions = (0.6, 0.9)
  if arg == 'tiny':
    shrink(c)
    # a softmax over 16 experts gives each ten times what one over 160 does
    c.model.moe.weight_scale = 1.6
  return c
