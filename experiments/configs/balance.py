"""The model on which balancing methods are compared: 0.11B active of 0.49B, 64 experts, 6 domains.

  python -m experiments.balance.run --tokens=tokens.xz --out=runs/balance

runs every method and seed of `experiments.balance.methods` with it; `:tiny` is the same in small,
for a CPU. `experiments.balance.ramp` is for the others: `:stress` has four times the learning rate,
unclipped; in `:climb` it rises from there; `:ramp` is shallow. A single run on text:

  python -m moe_jax.data.build_corpus --out=corpus
  python -m experiments.run --config=experiments/configs/balance.py --workdir=runs/balance
"""

import ml_collections

from experiments.configs.base import base, check_argument

DOMAINS = ('code_cpp', 'code_py', 'en_api', 'en_lit', 'en_ref', 'xx_he')


def get_config(arg: str = 'h100') -> ml_collections.ConfigDict:
  check_argument(arg, 'h100', 'stress', 'climb', 'ramp', 'tiny')
  c = base()
  c.steps = 600
  c.precision = 'bfloat16'
  c.balance = 'loss_free'

  c.model.vocab_size = 16_384
  c.model.attention = 'full'
  c.model.d_model = 768
  c.model.num_layers = 12
  c.model.num_dense_layers = 1
  c.model.d_ff = 2048
  c.model.init_std = 0.02
  c.model.remat = 'light'
  c.model.full = dict(num_heads=6, d_head=128)
  c.model.moe.num_experts = 64
  c.model.moe.top_k = 6
  c.model.moe.d_expert = 256
  c.model.moe.num_shared = 2
  c.model.moe.score = 'sigmoid'

  c.data.tokenizer = 'deepseek:16384'
  c.data.domains = {
    name: dict(source=f'corpus/{name}.jsonl', weight=1.0, max_megabytes=6.0) for name in DOMAINS
  }
  c.data.batch_size = 18
  c.data.sequence_length = 1024

  c.optim.lr_peak = 1e-3
  c.optim.warmup_steps = 40
  c.optim.lr_end_fraction = 0.02
  # spikes are what is counted: only steps that are not finite are refused
  c.guard.sigmas = 1e9
  c.eval.interval_steps = 150
  c.eval.batches = 8
  c.checkpoint.interval_steps = 1_000

  if arg in ('stress', 'climb'):
    c.steps = 250
    c.optim.lr_peak = 4e-3
    c.optim.clip_norm = 1e9  # clipping would hide the spikes
    c.optim.warmup_steps = 10
  if arg == 'ramp':
    c.steps = 300
    c.optim.lr_peak = 2e-3
    c.model.num_layers = 4
    c.data.batch_size = 12
    c.data.sequence_length = 512
  if arg == 'tiny':
    c.steps = 120
    c.precision = 'float32'
    c.model.remat = 'none'
    c.model.d_model = 64
    c.model.num_layers = 3
    c.model.d_ff = 128
    c.model.full = dict(num_heads=2, d_head=32)
    c.model.moe.d_expert = 32
    c.model.moe.num_shared = 1
    c.data.batch_size = 12
    c.data.sequence_length = 128
    c.optim.lr_peak = 4e-3
    c.eval.interval_steps = 40
  return c
