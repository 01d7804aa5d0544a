"""DeepSeek-V4-Pro: 1573.0B parameters, 49.78B active. `:tiny` has its kinds of layers, small.

python -m experiments.run --config=experiments/configs/deepseek/v4_pro.py:tiny --workdir=runs/tiny

What V4-Flash is, wider and deeper, and with compressed entries in its first layers too. Source:
arXiv:2606.19348, section 4.2.
"""

import ml_collections

from experiments.configs.base import check_argument
from experiments.configs.deepseek import v4_flash


def get_config(arg: str = 'full') -> ml_collections.ConfigDict:
  check_argument(arg, 'full', 'tiny')
  c = v4_flash.get_config()
  c.steps = 350_000  # 33T tokens

  c.model.d_model = 7168
  c.model.num_layers = 61
  c.model.attention_per_layer = ('hca',) * 2 + ('csa', 'hca') * 29 + ('csa',)
  c.model.compressed.num_heads = 128
  c.model.compressed.q_rank = 1536
  c.model.compressed.num_groups = 16
  c.model.compressed.index_top_k = 1024
  c.model.moe.num_experts = 384
  c.model.moe.d_expert = 3072
  c.model.moe.weight_scale = 2.5

  c.data.batch_size = 1440  # 94.4M tokens
  c.optim.lr_peak = 2.0e-4
  if arg == 'tiny':
    v4_flash.shrink(c, ('hca', 'csa', 'hca', 'csa'))
  return c
