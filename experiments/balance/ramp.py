"""Balancing methods at learning rates that are too high: a rate that rises, or is high throughout.

  python -m experiments.balance.ramp --tokens=tokens.xz --out=runs/ramp [--seeds=0,1,2]
  python -m moe_jax.analysis.ramp --runs=runs/ramp --out=docs/balance

After a while at `optim.lr_peak` the rate climbs by stairs of 15%. That is --arg=ramp, a shallow
model, and --arg=climb, the whole one, unclipped and from four times the comparison's rate, where
it stays with --arg=stress. The methods' strengths are carried in the state, so that one compiled
program serves them all. A run leaves OUT/ARG-METHOD-SEED.npz; one that is there is not made again.
"""

import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import flags
from experiments.balance.dialled import STRENGTHS, dial, register
from experiments.balance.methods import seeds
from experiments.balance.tokens import Rows
from experiments.balance.turns import turn
from experiments.command import Parser
from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.config import RunConfig
from moe_jax.train.state import create
from moe_jax.train.step import jit_train_step

CLIMBING = ('ramp', 'climb')
STAIR = 1.15  # the learning rate of a stair over that of the one before
STAIRS = 20  # it ends at 16 times its start
FLAT = 0.3  # of the steps before the first stair
# of every step: scalars, and means over layers
KEPT = (
  'train/lm_loss', 'train/grad_norm', 'train/lr', 'guard/skipped',
  'router/max_vio', 'router/dead_experts', 'router/grad_norm', 'router/bias_norm',
)  # fmt: skip


def configure(arg: str, changes: dict[str, Any]) -> RunConfig:
  c = flags.load('experiments/configs/balance.py', arg)
  c.balance = register()
  if arg in CLIMBING:
    at = np.linspace(FLAT, 1, STAIRS, endpoint=False).round(4)
    stairs = {'schedule': 'steps', 'step_factor': STAIR, 'step_fractions': tuple(at.tolist())}
    c.update_from_flattened_dict({f'optim.{name}': value for name, value in stairs.items()})
  c.update_from_flattened_dict(changes)
  return config_io.build(c.to_dict())


class Ramp:
  """The compiled program and the batches of every run."""

  def __init__(self, cfg: RunConfig, tokens: Path):
    self.cfg, rows = cfg, Rows(tokens, 'train', length=cfg.data.sequence_length)
    device = sh.batch_sharding(jax.sharding.get_mesh())
    batch = lambda i: jax.device_put(rows.batch(i, cfg.data.batch_size), device)
    make, key = jax.jit(functools.partial(create, cfg)), jax.random.key(0)
    tell('lowering')
    step: Any = jit_train_step(cfg)
    lowered = step.lower(jax.eval_shape(make, key), batch(0)), make.lower(key)
    tell('compiling')
    with ThreadPoolExecutor() as pool:
      compiled = [pool.submit(one.compile) for one in lowered]
      self._batches = [batch(i) for i in range(cfg.steps)]
      self._step, self._create = (future.result() for future in compiled)
    tell('compiled')

  def run(self, strengths: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    state = dial(self._create(jax.random.key(seed)), strengths)
    begun_s, seen = time.monotonic(), []
    for batch in self._batches:
      state, metrics = self._step(state, batch)
      seen.append({name: metrics[name] for name in KEPT})
    host = jax.device_get(seen)
    record = {name: np.array([m[name].mean() for m in host], np.float32) for name in seen[0]}
    return record | {'seconds': np.array(time.monotonic() - begun_s)}


def tell(text: str) -> None:
  print(f'{time.strftime("%H:%M:%S")} {text}', flush=True)


def main() -> None:
  parser = Parser('experiments.balance.ramp', __doc__)
  parser.add_argument('--tokens', type=Path, required=True, help='of experiments.balance.tokens')
  parser.add_argument('--out', type=Path, required=True, help='folder of the results')
  parser.add_argument('--arg', default='ramp', help='of the config: ramp, climb or stress')
  names = ','.join(STRENGTHS)
  parser.add_argument('--methods', default=names, help=f'some of {", ".join(STRENGTHS)}')
  parser.add_argument('--seeds', type=seeds, default='0,1,2', help='of the initial parameters')
  parser.add_argument('--turns', type=Path, help='a lock file, held while a run trains')
  parser.add_argument('--set', type=json.loads, default='{}', help='JSON of further fields')
  args = parser.parse_args()
  try:
    cfg, methods = configure(args.arg, args.set), args.methods.split(',')
    for name in methods:
      if name not in STRENGTHS:
        raise ValueError(f'--methods: {name!r} is not one. {config_io.nearest(name, STRENGTHS)}')
  except (ValueError, KeyError) as error:
    parser.error(flags.one_line(error))
  if not args.tokens.is_file():
    parser.error(f'--tokens={args.tokens} is not there. experiments.balance.tokens makes it.')
  args.out.mkdir(parents=True, exist_ok=True)
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    ramp = Ramp(cfg, args.tokens)
    # a run that is cut off leaves whole seeds of every method behind
    for seed in args.seeds:
      for name in methods:
        path = args.out / f'{args.arg}-{name}-{seed}.npz'
        if path.exists():
          continue
        with turn(args.turns):
          record = ramp.run(STRENGTHS[name], seed)
        np.savez_compressed(path, **record)  # pyright: ignore[reportArgumentType]
        loss_N = record['train/lm_loss']
        tell(
          f'{name:18} seed {seed}: {record["seconds"]:.1f} s, loss '
          f'{" ".join(f"{x:.2f}" for x in loss_N[:: max(cfg.steps // 10, 1)])} {loss_N[-1]:.2f}, '
          f'largest gradient {record["train/grad_norm"][cfg.steps // 10 :].max():.1f}, '
          f'MaxVio {record["router/max_vio"][cfg.steps // 2]:.2f}'
        )


if __name__ == '__main__':
  main()
