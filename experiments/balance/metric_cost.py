"""What the router's metrics cost: the comparison's step with them all, and with none.

  python -m experiments.balance.metric_cost [--balance=loss_free] [--repeats=40]

The second program returns the loss alone, so the compiler drops whatever only a metric needs. The
two take turns step by step, on a batch of random ids, and their medians are compared.
"""

import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from experiments import flags
from experiments.balance.turns import turn
from experiments.bench.steps import batch_like_text
from experiments.command import Parser
from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.config import RunConfig
from moe_jax.train.state import create
from moe_jax.train.step import make_train_step


def programs(cfg: RunConfig, batch: Any) -> tuple[Any, dict[str, Any]]:
  """A state, and the compiled steps by name."""
  step: Any = make_train_step(cfg)

  def bare(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    state, metrics = step(state, batch)
    return state, {'train/lm_loss': metrics['train/lm_loss']}

  make = jax.jit(functools.partial(create, cfg))
  key = jax.random.key(0)
  abstract = jax.eval_shape(make, key)
  compiled = {}
  for name, fn in (('all metrics', step), ('the loss alone', bare)):
    print(f'compiling the step with {name}', flush=True)
    compiled[name] = jax.jit(fn, donate_argnums=0).lower(abstract, batch).compile()
  return make(key), compiled


def main() -> None:
  parser = Parser('experiments.balance.metric_cost', __doc__)
  parser.add_argument('--balance', default='loss_free')
  parser.add_argument('--arg', default='h100')
  parser.add_argument('--repeats', type=int, default=40)
  parser.add_argument('--turns', type=Path, help='a lock file, held while steps are timed')
  args = parser.parse_args()
  c = flags.load('experiments/configs/balance.py', args.arg)
  c.balance = args.balance
  cfg = config_io.build(c.to_dict())
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    mesh = jax.sharding.get_mesh()
    batch = jax.device_put(batch_like_text(cfg), sh.batch_sharding(mesh))
    state, compiled = programs(cfg, batch)
    taken_s: dict[str, list[float]] = {name: [] for name in compiled}
    with turn(args.turns):
      for _ in range(args.repeats + 3):
        for name, fn in compiled.items():
          begun_s = time.perf_counter()
          state, metrics = fn(state, batch)
          jax.block_until_ready((state, metrics))
          taken_s[name].append(time.perf_counter() - begun_s)
  medians = {name: statistics.median(s[3:]) for name, s in taken_s.items()}
  for name, median_s in medians.items():
    steady = taken_s[name][3:]
    spread = (max(steady) - min(steady)) / median_s
    print(f'{name}: {median_s * 1e3:.2f} ms a step, spread {spread:.1%}')
  with_all, alone = medians.values()
  print(f'all metrics of the router together: {with_all / alone - 1:.2%} of the step')


if __name__ == '__main__':
  main()
