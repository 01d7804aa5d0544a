"""DeepSeek-V3.2: 671.88B parameters, 38.40B active, a lightning indexer in every layer.

python -m experiments.run --config=experiments/configs/deepseek/v32.py:tiny --workdir=runs/v32_tiny

Training goes in two stages from a trained DeepSeek-V3 (arXiv:2512.02556, section 2.1.1): `:warmup`
fits the indexer alone to dense attention, the default trains everything with sparse attention.
`:tiny` and `:tiny_warmup` are the same in miniature, seconds on a CPU.
"""

import ml_collections

from experiments.configs.base import base

STAGES = {'': 'sparse', 'warmup': 'dense_warmup'}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  size, _, stage = arg.partition('_') if arg.startswith('tiny') else ('full', '', arg)
  if size not in ('full', 'tiny') or stage not in STAGES:
    raise ValueError(
      f'{arg!r} is not one of warmup, tiny, tiny_warmup. Leave it out for the model.'
    )
  c = base()
  c.model.attention = 'dsa'
  c.model.dsa.stage = STAGES[stage]
  c.model.moe.weight_scale = 2.5
  c.balance = 'loss_free+sequence_wise'
  if size == 'tiny':
    _tiny(c)
  else:
    _full(c)
  if stage == 'warmup':
    c.steps = 60 if size == 'tiny' else 1000
    c.optim.trainable = 'indexer'
    c.optim.lr_peak = 1e-3
    c.optim.schedule = 'constant'
    c.optim.warmup_steps = 0
    c.data.batch_size = c.data.batch_size if size == 'tiny' else 16
  return c


def _full(c: ml_collections.ConfigDict) -> None:
  c.precision = 'bfloat16'
  c.steps = 15_000
  c.model.vocab_size = 129_280
  c.model.d_model = 7168
  c.model.num_layers = 61
  c.model.num_dense_layers = 3
  c.model.d_ff = 18_432
  c.model.remat = 'full'
  c.model.dsa.num_heads = 128
  c.model.dsa.d_nope = 128
  c.model.dsa.d_rope = 64
  c.model.dsa.d_value = 128
  c.model.dsa.kv_rank = 512
  c.model.dsa.q_rank = 1536
  c.model.dsa.num_index_heads = 64
  c.model.dsa.d_index = 128
  c.model.dsa.index_top_k = 2048
  c.model.rope.yarn_factor = 40.0
  c.model.moe.num_experts = 256
  c.model.moe.top_k = 8
  c.model.moe.d_expert = 2048
  c.model.moe.num_groups = 8
  c.model.moe.top_groups = 4

  c.data.tokenizer = 'deepseek'
  c.data.batch_size = 480
  c.data.sequence_length = 131_072
  c.optim.lr_peak = 7.3e-6
  c.optim.schedule = 'constant'


def _tiny(c: ml_collections.ConfigDict) -> None:
  c.steps = 60
  c.model.vocab_size = 264  # 257 bytes and the end of a document, rounded up to split over devices
  c.model.d_model = 32
  c.model.num_layers = 3
  c.model.d_ff = 64
  c.model.init_std = 0.05
  # fewer index heads than 8 let several keys score exactly 0, and ties at the cut
  c.model.dsa.num_heads = 4
  c.model.dsa.d_nope = 8
  c.model.dsa.d_rope = 8
  c.model.dsa.d_value = 8
  c.model.dsa.kv_rank = 16
  c.model.dsa.q_rank = 16
  c.model.dsa.num_index_heads = 8
  c.model.dsa.d_index = 16
  c.model.dsa.index_top_k = 16
  c.model.moe.num_experts = 8
  c.model.moe.top_k = 2
  c.model.moe.d_expert = 16
  c.model.moe.num_groups = 4
  c.model.moe.top_groups = 2

  c.data.tokenizer = 'bytes'
  c.data.domains = dict(plays=dict(source='plays', weight=1.0, max_megabytes=0.2))
  c.data.batch_size = 8
  c.data.sequence_length = 64
  c.optim.lr_peak = 3e-3
  c.optim.warmup_steps = 5
  c.eval.interval_steps = 30
  c.eval.batches = 1
  c.checkpoint.interval_steps = 30
  c.sample.num_tokens = 16
