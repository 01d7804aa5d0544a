"""A DeepSeek-V3 of seconds, for notebooks and for trying a sweep: four layers of 16 experts.

python -m experiments.run --config=experiments/configs/small.py --workdir=runs/small
"""

import ml_collections

from experiments.configs.base import base, check_argument


def get_config(arg: str = 'text') -> ml_collections.ConfigDict:
  """Argument `bytes`: two layers on bytes, where the embedding is small beside them."""
  check_argument(arg, 'text', 'bytes')
  c = base()
  c.steps = 150
  c.balance = 'loss_free+sequence_wise'
  # 1e-3 is for runs of many thousand steps: here the bias has 150 to find its place
  c.routing.loss_free.rate = 1e-2

  c.model.vocab_size = 1024
  c.model.d_model = 64
  c.model.num_layers = 4
  # one kind of layer compiles in half the time
  c.model.num_dense_layers = 0
  c.model.init_std = 0.04
  c.model.mla = dict(num_heads=4, d_nope=16, d_rope=8, d_value=16, kv_rank=32, q_rank=48)
  c.model.moe.num_experts = 16
  c.model.moe.top_k = 2
  c.model.moe.d_expert = 32

  c.data.tokenizer = 'deepseek:1024'
  c.data.domains = dict(
    plays=dict(source='plays', weight=0.5, max_megabytes=2.0),
    code=dict(source='code', weight=0.5, max_megabytes=2.0),
  )
  c.data.batch_size = 8
  c.data.sequence_length = 128

  c.optim.lr_peak = 4e-3
  c.optim.warmup_steps = 20
  c.eval.interval_steps = 25
  c.eval.batches = 4
  c.checkpoint.interval_steps = 50
  c.log.load_interval_steps = 5
  c.log.tensorboard = False
  if arg == 'bytes':
    c.data.tokenizer = 'bytes'
    c.model.vocab_size = 264
    c.model.num_layers = 2
    c.data.batch_size = 4
  return c
