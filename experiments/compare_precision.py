"""The same model on the same data under every precision policy: what FP8 costs in loss.

  python -m experiments.compare_precision --config=FILE:ARG --workdir=FOLDER [--only=fp8_block]
      [--tokens=tokens.xz] [--turns=FILE]

Each run starts from the same parameters and sees the same batches; its losses go to
FOLDER/NAME.json, and a run that is whole there is not repeated. `twin` is bfloat16 once more with
gradients rounded differently: what it is off by is the noise that any change of rounding makes. The
figure and FOLDER/summary.json have every run's loss relative to bfloat16's, over windows of steps,
and over the last quarter, DeepSeek-V3's measure of FP8 (below 0.25%; arXiv:2412.19437, B.1).

With --tokens the text is that of `experiments.balance.tokens`. Processes with an --only each and
the same --turns compile at once and train one after another.
"""

import contextlib
import copy
import functools
import itertools
import json
import operator
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags

from experiments import flags
from experiments.balance.tokens import Rows
from experiments.balance.turns import turn
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


@contextlib.contextmanager
def text(cfg: RunConfig, tokens: pathlib.Path | None) -> Iterator[Iterator[dict[str, jax.Array]]]:
  """The run's batches on the current mesh, in order."""
  sharding = sh.batch_sharding(jax.sharding.get_mesh())
  if tokens:
    rows = Rows(tokens, 'train', length=cfg.data.sequence_length)
    of_step = functools.partial(rows.batch, size=cfg.data.batch_size)
    yield (jax.device_put(of_step(i), sharding) for i in itertools.count())
    return
  source = RowSource(cfg.data, seed=cfg.seed, split='train')
  stream = batches(source, batch_size=cfg.data.batch_size, sharding=sharding, start=0)
  try:
    yield (batch for _, batch in stream)
  finally:
    stream.close()


def train(
  cfg: RunConfig,
  name: str,
  save: Callable[[list[float]], Any],
  *,
  tokens: pathlib.Path | None = None,
  turns: pathlib.Path | None = None,
) -> None:
  """Hands the losses so far to `save`, now and then and at the end."""
  mesh = sh.make_mesh(cfg.check_mesh(jax.device_count()))
  with jax.set_mesh(mesh), text(cfg, tokens) as stream:
    make = jax.jit(functools.partial(create, cfg))
    key, first = jax.random.key(cfg.seed), next(stream)
    step = jit_train_step(cfg).lower(jax.eval_shape(make, key), first).compile()
    print(f'{name}: compiled', flush=True)
    losses: list[Any] = []
    with turn(turns):
      state = make(key)
      for i, batch in zip(range(cfg.steps), itertools.chain([first], stream), strict=False):
        state, metrics = step(state, batch)
        losses.append(metrics['train/lm_loss'])
        if (i + 1) % _REPORTED_EVERY == 0 or i + 1 == cfg.steps:
          losses = [float(loss) for loss in losses]
          save(losses)
          print(f'{name}: step {i + 1}/{cfg.steps}, loss {losses[-1]:.4f}', flush=True)


def _losses(path: pathlib.Path) -> np.ndarray:
  return np.array(json.loads(path.read_text())['loss'] if path.exists() else [])


def main(argv: list[str]) -> int:
  parser = Parser('experiments.compare_precision', __doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='folder of results')
  about = f'one of {", ".join(RUNS)}; all without it'
  parser.add_argument('--only', type=one_of(RUNS), help=about)
  parser.add_argument('--tokens', type=pathlib.Path, help='of experiments.balance.tokens')
  parser.add_argument('--turns', type=pathlib.Path, help='a lock file, held while a run trains')
  args, rest = parser.parse_known_args(argv[1:])
  values = absl_flags.FlagValues()
  try:
    raw, _ = flags.parse([argv[0], *rest], values, flags.define(values))
    args.workdir.mkdir(parents=True, exist_ok=True)
    for name, overrides in RUNS.items():
      path = args.workdir / f'{name}.json'
      cfg = config_io.build(with_overrides(raw.to_dict(), overrides))
      if args.only not in (None, name) or len(_losses(path)) >= cfg.steps:
        continue
      check_device(cfg)

      def save(losses: list[float], path: pathlib.Path = path, overrides: Any = overrides) -> None:
        path.write_text(json.dumps({'overrides': overrides, 'loss': losses}))

      train(cfg, name, save, tokens=args.tokens, turns=args.turns)
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
