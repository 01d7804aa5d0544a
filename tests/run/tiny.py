"""A run of seconds: a DeepSeek-V3 in miniature on bytes of real text."""

import ml_collections

from experiments.configs.base import base


def get_config() -> ml_collections.ConfigDict:
  c = base()
  c.steps = 12
  c.model.vocab_size = 264  # 257 ids, rounded up to split over 8 devices
  c.model.d_model = 16
  c.model.num_layers = 3
  c.model.d_ff = 32
  c.model.init_std = 0.05
  c.model.mla = dict(num_heads=2, d_nope=8, d_rope=4, d_value=8, kv_rank=8, q_rank=8)
  c.model.moe.num_experts = 8
  c.model.moe.top_k = 2
  c.model.moe.d_expert = 8
  c.model.moe.num_groups = 4
  c.model.moe.top_groups = 2

  c.data.tokenizer = 'bytes'
  c.data.domains = dict(plays=dict(source='plays', weight=1.0, max_megabytes=0.2))
  c.data.batch_size = 8
  c.data.sequence_length = 32

  c.optim.lr_peak = 3e-3
  c.optim.warmup_steps = 3
  # a run of fewer steps is then the beginning of a longer one
  c.optim.schedule = 'constant'
  c.eval.interval_steps = 4
  c.eval.batches = 1
  c.checkpoint.interval_steps = 4
  c.log.load_interval_steps = 4
  c.log.tensorboard = False
  c.sample.num_tokens = 0  # sampling would compile two more functions
  return c
