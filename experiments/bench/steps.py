"""A training step to be timed: its state, a batch as packing makes them, the compiled program."""

import dataclasses
import functools
import itertools
import re
import statistics
import time
from typing import Any

import jax
import numpy as np

from moe_jax import sharding as sh
from moe_jax.analysis.human import count, size
from moe_jax.config import RunConfig
from moe_jax.data.pipeline import RowSource
from moe_jax.train import cost
from moe_jax.train.state import TrainState, create
from moe_jax.train.step import jit_train_step

# dense bf16 peak of a device, FLOP/s, by the data sheet
PEAK_FLOPS = 989e12
_MEAN_DOCUMENT = 1500  # tokens
_PARTS = ('tokens', 'targets', 'positions', 'segments', 'loss_mask')


@dataclasses.dataclass(frozen=True)
class Seen:
  """What a number of steps took."""

  tokens_per_s: float
  step_s: float  # median
  spread: float  # (slowest - fastest) / median
  mfu: float  # model operations over PEAK_FLOPS
  peak_bytes: int
  loss: float

  def describe(self) -> str:
    return (
      f'{self.step_s * 1e3:.1f} ms a step (spread {self.spread:.1%}), {self.tokens_per_s:,.0f} '
      f'tokens/s, MFU {self.mfu:.1%}, peak memory {size(self.peak_bytes)}, loss {self.loss:.4f}'
    )


def batches(cfg: RunConfig, num: int) -> tuple[list[dict[str, np.ndarray]], str]:
  """Batches of the config's own text, and 'text'; of `batch_like_text` where that is missing."""
  try:
    source = RowSource(cfg.data, seed=cfg.seed, split='train')
  except (ImportError, ValueError):
    return [batch_like_text(cfg, seed) for seed in range(num)], 'ids as frequent as in text'
  size, found = cfg.data.batch_size, []
  for i in range(num):
    rows = [source.row(i * size + r) for r in range(size)]
    found.append({name: np.stack([row[name] for row in rows]) for name in _PARTS})
  return found, 'text'


def batch_like_text(cfg: RunConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Random ids with the frequencies of text, in documents of random length: no file is read."""
  rng = np.random.default_rng(seed)
  shape = cfg.data.batch_size, cfg.data.sequence_length
  starts = rng.random(shape) < 1 / _MEAN_DOCUMENT
  starts[:, 0] = True
  place = np.broadcast_to(np.arange(shape[1]), shape)
  first = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
  tokens = rng.zipf(1.2, shape).clip(1, cfg.model.vocab_size) - 1
  targets = np.roll(tokens, -1, axis=1)
  return {
    'tokens': tokens.astype(np.int32),
    'targets': targets.astype(np.int32),
    'positions': (place - first).astype(np.int32),
    'segments': np.cumsum(starts, axis=1).astype(np.int32),
    'loss_mask': np.roll(~starts, -1, axis=1),
  }


def flops_per_token(cfg: RunConfig) -> float:
  """The model's own operations for one token, forward and backward."""
  with jax.set_mesh(sh.make_mesh(cfg.check_mesh(jax.device_count()))):
    params = jax.eval_shape(functools.partial(create, cfg), jax.random.key(0)).params
    return cost.flops_per_token(cfg.model, params, cfg.data.sequence_length)


def check_fp8(hlo: str) -> None:
  """Raises RuntimeError unless a compiled program's dense products of FP8 numbers are cuBLASLt's.

  XLA turns a product that cuBLASLt cannot take (its layout, its widths) into one of 16 bits, of
  the FP8 operands converted back, and says nothing.
  """
  dtype_of = dict(re.findall(r'%?([\w.\-]+) = (\w+)\[', hlo))
  wider = re.findall(r'= (?:bf16|f16|f32)\[[^\]]*\]\S* convert\((?:[^\s)]+ )?%?([\w.\-]+)\)', hlo)
  converted = [name for name in wider if dtype_of.get(name, '').startswith('f8')]
  if '__cublas$lt$matmul$f8' not in hlo or converted:
    raise RuntimeError(
      f'fp8_tensor: {hlo.count("__cublas$lt$matmul$f8")} products went to cuBLASLt in FP8, and '
      f'{len(converted)} FP8 operands were converted back to more bits.'
    )


class Step:
  """The training step of `cfg` on the first devices, compiled; its first run makes a fresh state.

  Until then it holds no memory of the device to speak of, so that others may be timed on it.
  """

  def __init__(self, cfg: RunConfig):
    self.cfg = cfg
    self.mesh = sh.make_mesh(cfg.check_mesh(jax.device_count()))
    with jax.set_mesh(self.mesh):
      make, self._key = jax.jit(functools.partial(create, cfg)), jax.random.key(cfg.seed)
      self.shapes = jax.eval_shape(make, self._key)
      length = cfg.data.sequence_length
      self.flops_per_token = cost.flops_per_token(cfg.model, self.shapes.params, length)
      place = jax.sharding.NamedSharding(self.mesh, sh.TOKENS)
      found, self.data = batches(cfg, 4)
      self.batches = [jax.device_put(batch, place) for batch in found]
      step = jit_train_step(cfg)
      start = time.perf_counter()
      self.compiled = step.lower(self.shapes, self.batches[0]).compile()
      self.compile_s = time.perf_counter() - start
      self._make = make.lower(self._key).compile()
    self.state: TrainState | None = None
    self.metrics: dict[str, Any] = {}
    self._steps = 0

  def run(self, steps: int) -> None:
    if self.state is None:
      self.state = self._make(self._key)
    for _ in range(steps):
      self._step()
    jax.block_until_ready(self.metrics)

  def _step(self) -> None:
    batch = self.batches[self._steps % len(self.batches)]
    self.state, self.metrics = self.compiled(self.state, batch)
    self._steps += 1

  def measure(self, steps: int, warm: int = 3) -> Seen:
    """As a run does it: a step is given to the device before the one before it is waited for."""
    self.run(warm)
    ends = []
    for _ in range(steps + 1):
      before = self.metrics
      self._step()
      jax.block_until_ready(before)
      ends.append(time.perf_counter())
    jax.block_until_ready(self.metrics)
    times = [end - start for start, end in itertools.pairwise(ends)]
    median = statistics.median(times)
    rate = self.cfg.tokens_per_step / median
    return Seen(
      tokens_per_s=rate,
      step_s=median,
      spread=(max(times) - min(times)) / median,
      mfu=rate * self.flops_per_token / (PEAK_FLOPS * jax.device_count()),
      peak_bytes=self.peak_bytes(),
      loss=float(self.metrics['train/loss']),
    )

  def peak_bytes(self) -> int:
    """What the program occupies on a device: its arguments, results and temporary memory.

    Of this program alone, where the device's own counter remembers what ran before.
    """
    m = self.compiled.memory_analysis()
    if m is None:
      return 0
    return (
      m.argument_size_in_bytes
      + m.output_size_in_bytes
      - m.alias_size_in_bytes
      + m.temp_size_in_bytes
    )

  def predicted_bytes(self) -> int:
    """As the run's card shows it; traces the model again."""
    with jax.set_mesh(self.mesh):
      return cost.predicted_bytes(self.cfg, self.shapes)

  def describe(self) -> str:
    cfg = self.cfg
    return (
      f'{cfg.precision}, remat {cfg.model.remat}, {cfg.data.batch_size} x '
      f'{cfg.data.sequence_length} tokens of {self.data}, '
      f'{count(self.flops_per_token)}FLOP a token, compiled in {self.compile_s:.0f} s'
    )
