"""DeepSeek-V3.2: 671.88B parameters, 38.40B active. `:tiny` has its kinds of layers, small.

python -m experiments.run --config=experiments/configs/deepseek/v32.py:tiny --workdir=runs/tiny

It goes on from a trained DeepSeek-V3 in two stages, without its indexers (`init_from` takes
the weights). `:warmup` attends to every key and fits the indexers alone; the default then trains
everything, attending to 2048 keys a query. `:tiny_warmup` is the first stage, small. The balance of
experts is V3's: the paper does not speak of it. Source: arXiv:2512.02556, section 2.1.1.
"""

import ml_collections

from experiments.configs.base import base, check_argument
from experiments.configs.deepseek.tiny import shrink


def get_config(arg: str = 'full') -> ml_collections.ConfigDict:
  check_argument(arg, 'full', 'warmup', 'tiny', 'tiny_warmup')
  warmup = arg.endswith('warmup')
  c = base()
  c.steps = 1000 if warmup else 15_000  # 2.1B and 943.7B tokens
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
  c.model.attention = 'dsa'
  c.model.dsa.update(num_heads=128, d_nope=128, d_rope=64, d_value=128, kv_rank=512, q_rank=1536)
  c.model.dsa.update(num_index_heads=64, d_index=128, index_top_k=2048)
  c.model.dsa.stage = 'dense_warmup' if warmup else 'sparse'
  c.model.rope.yarn_factor = 40.0
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
  c.data.batch_size = 16 if warmup else 480
  c.data.sequence_length = 131_072

  c.optim.schedule = 'constant'
  c.optim.lr_peak = 7.3e-6
  if arg.startswith('tiny'):
    shrink(c)
    c.model.dsa.update(num_heads=8, d_nope=8, d_rope=8, d_value=8, kv_rank=24, q_rank=32)
    # with fewer index heads several keys score exactly 0, and ties decide what is seen
    c.model.dsa.update(num_index_heads=8, d_index=16, index_top_k=8)
  if warmup:
    c.optim.trainable = 'indexer'
    c.optim.lr_peak = 1e-3
    c.optim.warmup_steps = 0
  return c
