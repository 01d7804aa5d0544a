"""Whole training steps, by precision policy: tokens/s, share of the peak, memory.

  moe_1b     1.03B parameters, 0.31B active, 16 x 4096 tokens (experiments/configs/moe_1b.py)
  moe_1b_strict  the same, and what remat leaves to be made again is (`model.strict_remat`)
  v2_lite_5  DeepSeek-V2-Lite's widths in 5 layers, 2.84B parameters, 2 x 4096 tokens; beside it
             transformers with compiled grouped matmuls, its parameters and moments in bfloat16
  v3_4       DeepSeek-V3's widths in 4 layers, 8 local experts that each see every token, as on a
             device of 32 that share 256; vocabulary 32768; 2 x 4096 tokens

Ours have float32 master weights, moments in bfloat16 rounded by chance, real routers, and the text
of plays and code where it is installed. `--only=v2_lite_5/fp8` selects rows. A row of fp8_tensor
fails if its program multiplies the FP8 numbers in 16 bits. The rate counts the model's own
operations, forward and backward, once; the limit is the data sheet's 989 TFLOP/s under every
policy, so that FP8 shows what it saves.
"""

import functools
import gc
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator

import jax
import ml_collections

from experiments.balance.turns import turn
from experiments.bench import steps, table, timing
from experiments.configs import moe_1b
from experiments.configs.base import base
from experiments.configs.deepseek import v2_lite, v3
from moe_jax import config_io
from moe_jax.analysis.human import size

POLICIES = ('bfloat16', 'fp8_block', 'fp8_tensor')
LIMIT = steps.PEAK_FLOPS / 1e12
STEPS = 10


def run(only: str = '') -> Iterator[list[table.Row]]:
  cases = CASES if jax.default_backend() == 'gpu' else {'tiny': tiny}
  for name, config in cases.items():
    for precision in POLICIES:
      if only in f'{name}/{precision}':
        yield from guarded(f'{name}/{precision}', functools.partial(ours, name, config, precision))
    if name == 'v2_lite_5' and only in f'{name}/transformers':
      yield from guarded(f'{name}/transformers', transformers)


def guarded(name: str, measure: Callable[[], list[table.Row]]) -> Iterator[list[table.Row]]:
  """A row that fails leaves a line and the others."""
  try:
    yield measure()
  except Exception as error:
    if jax.default_backend() != 'gpu':
      raise
    print(f'{name}: {type(error).__name__}: {str(error)[:300]}', file=sys.stderr, flush=True)
  gc.collect()


def _moe_1b() -> ml_collections.ConfigDict:
  c = moe_1b.get_config()
  # a scan copies its layers' weights and kept values, and runs the kernels that write these twice
  c.model.unroll_layers = True
  return c


def _moe_1b_strict() -> ml_collections.ConfigDict:
  c = _moe_1b()
  c.model.strict_remat = True
  return c


def _v2_lite_5() -> ml_collections.ConfigDict:
  c = v2_lite.get_config()
  c.model.num_layers = 5
  # 'none' would also keep every layer's rounded weights for the backward pass
  c.model.remat = 'light'
  c.model.unroll_layers = True
  c.data.batch_size = 2
  return c


def _v3_4() -> ml_collections.ConfigDict:
  c = v3.get_config()
  c.model.num_layers = 4
  c.model.num_dense_layers = 1
  c.model.vocab_size = 32_768
  c.model.remat = 'light'
  c.model.unroll_layers = True
  c.model.moe.update(num_experts=8, top_k=8, num_groups=1, top_groups=1)
  c.data.tokenizer = 'deepseek:32768'
  c.data.batch_size = 2
  return c


def tiny() -> ml_collections.ConfigDict:
  c = base()
  c.model.num_layers = 2
  c.model.moe.d_expert = 128
  c.data.tokenizer = 'bytes'
  c.data.batch_size = 2
  c.data.domains = dict(plays=dict(source='synthetic', weight=1.0, max_megabytes=0.1))
  return c


CASES = {
  'moe_1b': _moe_1b,
  'moe_1b_strict': _moe_1b_strict,
  'v2_lite_5': _v2_lite_5,
  'v3_4': _v3_4,
}


def ours(
  name: str, config: Callable[[], ml_collections.ConfigDict], precision: str
) -> list[table.Row]:
  c = config()
  c.precision = precision
  c.optim.moments_dtype = 'bfloat16'
  step = steps.Step(config_io.build(c.to_dict()))
  print(f'{name}: {step.describe()}', file=sys.stderr, flush=True)
  if precision == 'fp8_tensor' and jax.default_backend() == 'gpu':
    steps.check_fp8(step.compiled.as_text() or '')
  with turn(timing.turns):
    seen = step.measure(STEPS if jax.default_backend() == 'gpu' else 1)
    step.state = None
  cfg = step.cfg
  return [
    table.row_of(
      timing.Timing(seen.step_s, seen.spread),
      amount=step.flops_per_token * cfg.tokens_per_step,
      limit=LIMIT,
      unit='TFLOP/s',
      work='step',
      shape=f'{name} {cfg.data.batch_size} x {cfg.data.sequence_length}',
      sizes=step.data,
      by=precision,
      note=f'{seen.tokens_per_s:,.0f} tokens/s, {size(seen.peak_bytes)} '
      f'({size(step.predicted_bytes())} predicted), remat {cfg.model.remat}',
    )
  ]


def transformers() -> list[table.Row]:
  """DeepSeek-V2 of transformers, compiled: bfloat16 parameters and moments, nothing made again."""
  try:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import (  # pyright: ignore[reportMissingImports]
      AutoModelForCausalLM,
      DeepseekV2Config,
    )
  except ImportError as error:
    print(f'transformers: {error}', file=sys.stderr)
    return []
  logging.getLogger('transformers').setLevel(logging.ERROR)
  c = _v2_lite_5()
  cfg, shape = config_io.build(c.to_dict()), (c.data.batch_size, c.data.sequence_length)
  config = DeepseekV2Config(
    vocab_size=c.model.vocab_size, hidden_size=c.model.d_model, intermediate_size=c.model.d_ff,
    moe_intermediate_size=c.model.moe.d_expert, num_hidden_layers=c.model.num_layers,
    num_attention_heads=c.model.mla.num_heads, num_key_value_heads=c.model.mla.num_heads,
    n_shared_experts=c.model.moe.num_shared, n_routed_experts=c.model.moe.num_experts,
    num_experts_per_tok=c.model.moe.top_k, q_lora_rank=None, kv_lora_rank=c.model.mla.kv_rank,
    qk_rope_head_dim=c.model.mla.d_rope, qk_nope_head_dim=c.model.mla.d_nope,
    v_head_dim=c.model.mla.d_value, first_k_dense_replace=c.model.num_dense_layers,
    topk_method='greedy', n_group=1, topk_group=1, norm_topk_prob=False,
    routed_scaling_factor=1.0, max_position_embeddings=shape[1], use_cache=False,
  )  # fmt: skip
  with torch.device('cuda'):
    model = AutoModelForCausalLM.from_config(
      config, dtype=torch.bfloat16, attn_implementation='sdpa', experts_implementation='grouped_mm'
    )
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  ids = [
    torch.tensor(steps.batch_like_text(cfg, seed)['tokens'], device='cuda').long()
    for seed in range(4)
  ]
  loss_of = torch.compile(lambda ids: model(input_ids=ids, labels=ids).loss)

  def step(ids):
    loss = loss_of(ids)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss

  for part in ids:
    step(part)
  torch.cuda.synchronize()
  torch.cuda.reset_peak_memory_stats()
  done, ends = [], []
  with turn(timing.turns):
    for i in range(STEPS + 2):
      step(ids[i % len(ids)])
      done.append(torch.cuda.Event())
      done[-1].record()
      if i:
        # as ours: a step is given to the device before the one before it is waited for
        done[-2].synchronize()
        ends.append(time.perf_counter())
    torch.cuda.synchronize()
  times = [end - start for start, end in itertools.pairwise(ends)]
  median = sorted(times)[len(times) // 2]
  peak = torch.cuda.max_memory_allocated()
  del model, optimizer, loss_of
  torch.cuda.empty_cache()
  tokens = shape[0] * shape[1]
  return [
    table.row_of(
      timing.Timing(median, (max(times) - min(times)) / median),
      amount=steps.flops_per_token(cfg) * tokens,
      limit=LIMIT,
      unit='TFLOP/s',
      work='step',
      shape=f'v2_lite_5 {shape[0]} x {shape[1]}',
      sizes='ids as frequent as in text',
      by='transformers, torch.compile',
      note=f'{tokens / median:,.0f} tokens/s, {size(peak)}, bfloat16 parameters',
    )
  ]
