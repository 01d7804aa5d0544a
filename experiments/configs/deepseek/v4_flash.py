"""DeepSeek-V4-Flash: 284.33B parameters, 13.80B active. `:tiny` has its kinds of layers, small.

python -m experiments.run --config=experiments/configs/deepseek/v4_flash.py:tiny --workdir=runs/tiny

The main model at the context that sparse attention was introduced with. The report grows the batch
to 75.5M tokens and the context from 4096 to 1,048,576, with dense attention for the first 1T of 32T
tokens; here the batch is the largest throughout. Source: arXiv:2606.19348, section 4.2.
"""

import ml_collections

from experiments.configs.base import base, check_argument


def get_config(arg: str = 'full') -> ml_collections.ConfigDict:
  check_argument(arg, 'full', 'tiny')
  c = base()
  c.steps = 424_000  # 32T tokens
  c.precision = 'bfloat16'
  c.balance = 'loss_free+sequence_wise'
  c.routing.loss_free.rate = 1e-3
  c.routing.sequence_wise.weight = 1e-4

  c.model.vocab_size = 129_280
  c.model.d_model = 4096
  c.model.num_layers = 43
  c.model.num_dense_layers = 0
  c.model.attention = 'csa'
  c.model.attention_per_layer = ('sliding',) * 2 + ('csa', 'hca') * 20 + ('csa',)
  c.model.residual = 'mhc'
  c.model.init_std = 0.006
  c.model.remat = 'full'
  c.model.compressed.num_heads = 64
  c.model.compressed.d_head = 512
  c.model.compressed.d_rope = 64
  c.model.compressed.q_rank = 1024
  c.model.compressed.window = 128
  c.model.compressed.num_groups = 8
  c.model.compressed.group_rank = 1024
  c.model.compressed.csa_ratio = 4
  c.model.compressed.hca_ratio = 128
  c.model.compressed.num_index_heads = 64
  c.model.compressed.d_index = 128
  c.model.compressed.index_top_k = 512
  c.model.moe.num_experts = 256
  c.model.moe.top_k = 6
  c.model.moe.d_expert = 2048
  c.model.moe.num_shared = 1
  c.model.moe.score = 'sqrt_softplus'
  c.model.moe.weight_scale = 1.5
  c.model.moe.num_hash_layers = 3
  c.model.moe.swiglu_limit = 10.0

  c.data.tokenizer = 'deepseek'
  c.data.batch_size = 1152  # 75.5M tokens
  c.data.sequence_length = 65_536

  c.optim.lr_peak = 2.7e-4
  c.optim.warmup_steps = 2000
  c.optim.schedule = 'wsd'
  c.optim.lr_end_fraction = 0.1
  c.optim.eps = 1e-20
  if arg == 'tiny':
    shrink(c, ('sliding', 'sliding', 'csa', 'hca', 'csa'))
  return c


def shrink(c: ml_collections.ConfigDict, kinds: tuple[str, ...]) -> None:
  """Makes a V4 that trains on a CPU in seconds, with layers of these kinds."""
  c.steps = 60
  c.precision = 'float32'
  c.model.vocab_size = 264  # 257 bytes and the end of a document, rounded up to split over devices
  c.model.d_model = 32
  c.model.num_layers = len(kinds)
  c.model.attention_per_layer = kinds
  c.model.init_std = 0.05
  c.model.remat = 'none'
  c.model.mhc.sinkhorn_iterations = 5
  # fewer index heads than 8 let several entries score exactly 0, and ties at the cut
  c.model.compressed.update(
    num_heads=4, d_head=16, q_rank=16, window=8, num_groups=2, group_rank=8, d_rope=8,
    hca_ratio=8, num_index_heads=8, d_index=16, index_top_k=4, rope=dict(yarn_original_length=64),
  )  # fmt: skip
  c.model.moe.num_experts = 8
  c.model.moe.top_k = 2
  c.model.moe.d_expert = 16
  c.model.moe.num_hash_layers = 1

  c.data.tokenizer = 'bytes'
  c.data.domains = dict(plays=dict(source='plays', weight=1.0, max_megabytes=0.2))
  c.data.batch_size = 8
  c.data.sequence_length = 32
  c.optim.lr_peak = 1e-2
  c.optim.warmup_steps = 5
  c.optim.schedule = 'cosine'
  c.eval.interval_steps = 30
  c.eval.batches = 1
  c.checkpoint.interval_steps = 30
  c.sample.num_tokens = 16
