"""DeepSeek-V3: 671.03B parameters, 37.55B active. `:tiny` has its kinds of layers, small.

python -m experiments.run --config=experiments/configs/deepseek/v3.py:tiny --workdir=runs/tiny

The main model as trained at 4096 tokens. The paper grows the batch from 3072 to 15360 sequences
over the first 469B tokens, holds the rate until 10T and ends in two plateaus; here the batch is
15360 from the start and the rate a cosine to a tenth. Source: arXiv:2412.19437, section 4.2.
"""

import ml_collections

from experiments.configs.base import base, check_argument
from experiments.configs.deepseek.tiny import shrink


def get_config(arg: str = 'full') -> ml_collections.ConfigDict:
  check_argument(arg, 'full', 'tiny')
  c = base()
  c.steps = 235_200  # 14.8T tokens
  c.precision = 'bfloat16'
  c.balance = 'loss_free+sequence_wise'
  c.routing.loss_free.rate = 1e-3
  c.routing.sequence_wise.weight = 1e-4

  c.model.vocab_size = 129_280
  c.model.d_model = 7168
  c.model.num_layers = 61
  c.model.num_dense_layers = 3
  c.model.d_ff = 18_432
  c.model.init_std = 0.006
  c.model.remat = 'full'
  c.model.mla = dict(num_heads=128, d_nope=128, d_rope=64, d_value=128, kv_rank=512, q_rank=1536)
  c.model.moe.num_experts = 256
  c.model.moe.top_k = 8
  c.model.moe.d_expert = 2048
  c.model.moe.num_shared = 1
  c.model.moe.score = 'sigmoid'
  c.model.moe.num_groups = 8
  c.model.moe.top_groups = 4
  c.model.moe.group_score = 'top2'
  c.model.moe.weight_scale = 2.5

  c.data.tokenizer = 'deepseek'
  c.data.batch_size = 15_360
  c.data.sequence_length = 4096

  c.optim.lr_peak = 2.2e-4
  c.optim.warmup_steps = 2000
  c.optim.schedule = 'cosine'
  c.optim.lr_end_fraction = 0.1
  if arg == 'tiny':
    shrink(c)
  return c
