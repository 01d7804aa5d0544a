"""What the `:tiny` argument of every published model shares: minutes become seconds on a CPU."""

import ml_collections


def shrink(c: ml_collections.ConfigDict) -> None:
  """Cuts data, schedule and widths; the kinds of layers, routers and losses stay."""
  c.steps = 30
  c.precision = 'float32'
  c.model.vocab_size = 264  # 257 bytes, rounded up to what 8 devices can share
  c.model.d_model = 64
  c.model.num_layers = 4
  c.model.d_ff = 96
  c.model.init_std = 0.05
  c.model.remat = 'none'
  c.model.full = dict(num_heads=8, d_head=8)
  c.model.mla.update(num_heads=8, d_nope=8, d_rope=8, d_value=8, kv_rank=24)
  if c.model.mla.q_rank:
    c.model.mla.q_rank = 32
  c.model.moe.num_experts = 16
  c.model.moe.top_k = 4
  c.model.moe.d_expert = 32
  if c.model.rope.yarn_factor > 1:
    c.model.rope.yarn_original_length = 16
  c.data.tokenizer = 'bytes'
  c.data.domains = dict(plays=dict(source='plays', weight=1.0, max_megabytes=0.2))
  c.data.batch_size = 8
  c.data.sequence_length = 32
  c.microbatches = 1
  c.optim.schedule = 'constant'
  c.optim.lr_peak = 5e-3
  c.optim.warmup_steps = 10
  c.eval.interval_steps = 30
  c.eval.batches = 2
  c.checkpoint.interval_steps = 30
  c.sample.num_tokens = 20
