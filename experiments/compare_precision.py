"""The same model on the same data under every precision policy: what FP8 costs in loss.

  python -m experiments.compare_precision --config=FILE:ARG --workdir=FOLDER [--only=fp8_block]

Each run starts from the same parameters and sees the same batches; its losses go to
FOLDER/NAME.json, and a run that is whole there is not repeated. `twin` is bfloat16 once more with
gradients rounded differently: what it is off by is the noise that any change of rounding makes. The
figure and FOLDER/summary.json have every run's loss relative to bfloat16's, over windows of steps,
and over the last quarter, DeepSeek-V3's measure of FP8 (below 0.25%; arXiv:2412.19437, B.1).
"""

import copy
import functools
import json
import operator
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags

from experiments import flags
from experiments.command import Parser, one_of
from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.analysis.precision import draw, summarize
from moe_jax.config import RunConfig
from moe_jax.data.pipeline import RowSource, batches
from moe_jax.precision import check_device
from moe_jax.train.state import create
from moe_jax.train.step import jit_train_step

RUNS = {
  'bfloat16': {'precision': 'bfloat16'},
  'twin': {'precision': 'bfloat16', 'precision_overrides.gradients': 'float32'},
  'fp8_block': {'precision': 'fp8_block'},
  'fp8_tensor': {'precision': 'fp8_tensor'},
  'fp8_block, e5m2 gradients': {
    'precision': 'fp8_block',
    **{f'precision_overrides.{kind}_{product}': 'e5m2' for kind in ('linear', 'experts')
       for product in ('dgrad', 'wgrad')},
  },
}  # fmt: skip
_REPORTED_EVERY = 100


def with_overrides(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
  """Nested values with those of dotted names in their places."""
  values = copy.deepcopy(values)
  for name, value in overrides.items():
    *path, last = name.split('.')
    functools.reduce(operator.getitem, path, values)[last] = value
  return values


def train(cfg: RunConfig, name: str, save: Callable[[list[float]], Any]) -> None:
  """Hands the losses so far to `save`, now and then and at the end."""
  mesh = sh.make_mesh(cfg.check_mesh(jax.device_count()))
  with jax.set_mesh(mesh):
    state = jax.jit(functools.partial(create, cfg))(jax.random.key(cfg.seed))
    step = jit_train_step(cfg)
    source = RowSource(cfg.data, seed=cfg.seed, split='train')
    stream = batches(
      source, batch_size=cfg.data.batch_size, sharding=sh.batch_sharding(mesh), start=0
    )
    losses: list[Any] = []
    try:
      for i, batch in stream:
        if i == cfg.steps:
          break
        state, metrics = step(state, batch)
        losses.append(metrics['train/lm_loss'])
        if (i + 1) % _REPORTED_EVERY == 0 or i + 1 == cfg.steps:
          losses = [float(loss) for loss in losses]
          save(losses)
          print(f'{name}: step {i + 1}/{cfg.steps}, loss {losses[-1]:.4f}', flush=True)
    finally:
      stream.close()


def _losses(path: pathlib.Path) -> np.ndarray:
  return np.array(json.loads(path.read_text())['loss'] if path.exists() else [])


def main(argv: list[str]) -> int:
  parser = Parser('experiments.compare_precision', __doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='folder of results')
  about = f'one of {", ".join(RUNS)}; all without it'
  parser.add_argument('--only', type=one_of(RUNS), default='', help=about)
  args, rest = parser.parse_known_args(argv[1:])
  values = absl_flags.FlagValues()
  try:
    raw, _ = flags.parse([argv[0], *rest], values, flags.define(values))
    args.workdir.mkdir(parents=True, exist_ok=True)
    for name, overrides in RUNS.items():
      path = args.workdir / f'{name}.json'
      cfg = config_io.build(with_overrides(raw.to_dict(), overrides))
      if args.only not in ('', name) or len(_losses(path)) >= cfg.steps:
        continue
      check_device(cfg)

      def save(losses: list[float], path: pathlib.Path = path, overrides: Any = overrides) -> None:
        path.write_text(json.dumps({'overrides': overrides, 'loss': losses}))

      train(cfg, name, save)
  except ValueError as error:
    print(f'error: {flags.one_line(error)}', file=sys.stderr)
    return 2
  loss = {name: _losses(args.workdir / f'{name}.json') for name in RUNS}
  common = min((len(loss_N) for loss_N in loss.values() if len(loss_N)), default=0)
  found = {name: loss_N[:common] for name, loss_N in loss.items() if len(loss_N)}
  if 'bfloat16' not in found:
    return 0
  summary = summarize(found)
  (args.workdir / 'summary.json').write_text(json.dumps(summary, indent=1) + '\n')
  draw(found, summary).savefig(args.workdir / 'loss.png')
  print(json.dumps(summary, indent=1))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
