"""Trains the comparison's model with every method and seed, in one process.

  python -m experiments.balance.run --tokens=tokens.xz --out=runs/balance \\
    --methods='none,aux 1e-3,loss-free' --seeds=0,1,2

A method is compiled once; a seed changes the initial parameters, never the data or their order.
Each run leaves OUT/ARG-METHOD-SEED.npz (see `Method.run`); a run that is there is not made again.

To use more cores, start a process for each method with --turns=FILE, the same in all: they compile
at once and then train one after another, so that none slows another down.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import flags
from experiments.balance.methods import METHODS, seeds
from experiments.balance.tokens import Rows
from experiments.balance.turns import turn
from experiments.command import Parser
from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.config import RunConfig
from moe_jax.train.routing_record import Routing, overlap
from moe_jax.train.state import TrainState, create
from moe_jax.train.step import jit_train_step, make_eval_step

CONFIG = 'experiments/configs/balance.py'
# of every step: scalars, and the mean over layers and the largest of
SCALARS = ('train/lm_loss', 'train/balance_loss', 'train/grad_norm', 'guard/skipped')
BY_LAYER = (
  'max_vio', 'load_cv', 'entropy', 'margin', 'dead_experts', 'bias_norm', 'dropped', 'grad_norm',
)  # fmt: skip
EVALUATED = ('max_vio_global', 'dead_global', 'domain_information', 'coactivation')
GLOBAL_STEPS = 50  # the last steps, whose loads are summed for the MaxVio of training
KEPT_STEPS = 200  # the last steps, whose loads are kept: how does MaxVio fall with steps summed?


def configure(method: str, arg: str, changes: dict[str, Any]) -> RunConfig:
  if method not in METHODS:
    raise ValueError(f'--methods: {method!r} is not one. {config_io.nearest(method, METHODS)}')
  c = flags.load(CONFIG, arg)
  c.update_from_flattened_dict(METHODS[method] | changes)
  return config_io.build(c.to_dict())


class Method:
  """One method, compiled."""

  def __init__(self, cfg: RunConfig, tokens: Path, *, tell: Callable[[str], None]):
    self.cfg, length, self._tell = cfg, cfg.data.sequence_length, tell
    self._train, self._validation = (
      Rows(tokens, split, length=length) for split in ('train', 'validation')
    )
    self._bytes_V, key = np.zeros(cfg.model.vocab_size, np.int32), jax.random.key(0)
    make = jax.jit(functools.partial(create, cfg))
    tell('compiling the initial state')
    self._create = make.lower(key).compile()
    state, batch = jax.eval_shape(make, key), self._batch(self._train, 0)
    step: Any = jit_train_step(cfg)
    tell('compiling the step')
    self._step = step.lower(state, batch).compile()
    tell('compiling the evaluation')
    eval_step: Any = jax.jit(make_eval_step(cfg))
    self._eval_step = eval_step.lower(state, batch, self._bytes_V).compile()
    tell('compiled')

  def _batch(self, rows: Rows, index: int) -> dict[str, jax.Array]:
    return jax.device_put(
      rows.batch(index, self.cfg.data.batch_size), sh.batch_sharding(jax.sharding.get_mesh())
    )

  def evaluate(self, state: TrainState) -> tuple[np.ndarray, Routing]:
    """The loss of each batch of validation text, and the routing of all."""
    seen = [
      self._eval_step(state, self._batch(self._validation, i), self._bytes_V)
      for i in range(self.cfg.eval.batches)
    ]
    loss_B = np.array([float(e.nats) / float(e.targets) for e in seen])
    routing = Routing.of(seen)
    assert routing is not None
    return loss_B, routing

  def run(self, seed: int) -> dict[str, np.ndarray]:
    """Trains from `seed`; the record of the run by name."""
    state = self._create(jax.random.key(seed))
    device, evals, routings = [], [], []
    begun_s = time.monotonic()
    for i in range(self.cfg.steps):
      state, metrics = self._step(state, self._batch(self._train, i))
      device.append(metrics)
      if i == 0:
        jax.block_until_ready(metrics)
        begun_s = time.monotonic()
      if i in (0, 10, 30):
        self._tell(f'seed {seed} has done step {i + 1}')
      due = (i + 1) % self.cfg.eval.interval_steps == 0 or i + 1 == self.cfg.steps
      if due:
        jax.block_until_ready(metrics)
        paused_s = time.monotonic()
        loss_B, routing = self.evaluate(state)
        evals.append((i + 1, loss_B))
        routings.append(routing)
        begun_s += time.monotonic() - paused_s
    seconds = time.monotonic() - begun_s
    host = [jax.tree.map(np.asarray, m) for m in device]
    load_NLE = np.array([m['router/load'] for m in host[-KEPT_STEPS:]], np.float32)
    load_LE = load_NLE[-GLOBAL_STEPS:].sum(0)
    record = {
      'seconds': np.array(seconds),
      'load_LE': load_LE,
      'load_NLE': load_NLE,
      'eval_steps': np.array([step for step, _ in evals]),
      'eval_loss': np.stack([loss_B for _, loss_B in evals]),  # by step and batch
      'load_LGE': routings[-1].load_LGE,
      'overlap': np.array([overlap(r.chosen_LTK, routings[-1].chosen_LTK) for r in routings]),
    }
    for name in EVALUATED:
      record[f'eval/{name}'] = np.array([r.metrics(None)[f'router/{name}'] for r in routings])
    for name in SCALARS:
      record[name] = np.array([m[name] for m in host], np.float32)
    for name in BY_LAYER:
      values_NL = np.array([m[f'router/{name}'] for m in host], np.float32)
      record[f'router/{name}'] = values_NL.mean(-1)
      record[f'worst/{name}'] = values_NL.max(-1)
    return record


def report(method: str, seed: int, cfg: RunConfig, record: dict[str, np.ndarray]) -> str:
  vio_L = record['load_LE'].max(-1) / record['load_LE'].mean(-1) - 1
  rate = (cfg.steps - 1) * cfg.tokens_per_step / record['seconds']
  return (
    f'{method:15} seed {seed}: validation {record["eval_loss"][-1].mean():.4f}, MaxVio there '
    f'{record["eval/max_vio_global"][-1].mean():.3f}; '
    f'training {record["train/lm_loss"][-20:].mean():.4f}, '
    f'MaxVio batch {record["router/max_vio"][-20:].mean():.3f}, last steps {vio_L.mean():.3f} '
    f'(worst {vio_L.max():.3f}), dead {record["router/dead_experts"][-20:].mean():.1f} a layer; '
    f'refused {int(record["guard/skipped"].sum())}, {record["seconds"]:.1f} s, '
    f'{rate:,.0f} tokens/s'
  )


def main() -> int:
  parser = Parser('experiments.balance.run', __doc__)
  parser.add_argument('--tokens', type=Path, required=True, help='of experiments.balance.tokens')
  parser.add_argument('--out', type=Path, required=True, help='folder of the results')
  parser.add_argument('--arg', default='h100', help='of the config: h100 or tiny')
  names = ','.join(METHODS)
  parser.add_argument('--methods', default=names, help=f'some of {", ".join(METHODS)}')
  parser.add_argument('--seeds', type=seeds, default='0,1,2', help='of the initial parameters')
  parser.add_argument('--turns', type=Path, help='a lock file, held while a method trains')
  parser.add_argument('--set', type=json.loads, default='{}', help='JSON of further fields')
  args = parser.parse_args()
  # refused before anything starts
  try:
    cfgs = {m: configure(m, args.arg, args.set) for m in args.methods.split(',')}
  except (ValueError, KeyError) as error:
    parser.error(flags.one_line(error))
  if not args.tokens.is_file():
    parser.error(f'--tokens={args.tokens} is not there. experiments.balance.tokens makes it.')
  args.out.mkdir(parents=True, exist_ok=True)
  failed = False
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    for name, cfg in cfgs.items():
      paths = {seed: args.out / f'{args.arg}-{name}-{seed}.npz' for seed in args.seeds}
      todo = {seed: path for seed, path in paths.items() if not path.exists()}
      try:
        if not todo:
          continue
        method = Method(cfg, args.tokens, tell=functools.partial(tell, name))
        # all seeds in one turn: a process that waits between two would keep its memory
        with turn(args.turns):
          for seed, path in todo.items():
            record = method.run(seed)
            np.savez_compressed(path, **record)  # pyright: ignore[reportArgumentType]
            print(report(name, seed, cfg, record), flush=True)
      except Exception as e:  # the other methods go on
        print(f'{name}: FAILED: {type(e).__name__}: {str(e)[:600]}', flush=True)
        failed = True
  return int(failed)


def tell(method: str, text: str) -> None:
  print(f'{time.strftime("%H:%M:%S")} {method}: {text}', flush=True)


if __name__ == '__main__':
  sys.exit(main())
