"""What the router's metrics cost: the comparison's step with them all, and with none.

  python -m experiments.balance.metric_cost [--balance=loss_free] [--repeats=200]

The second program returns the loss alone, so the compiler drops whatever only a metric needs. The
two take turns step by step, on a batch of random ids, each first in every other turn; the cost is
the median of the turns' differences, with its bootstrap interval: a clock that drifts meets both.
"""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

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


def cost(with_all_s: np.ndarray, alone_s: np.ndarray) -> tuple[float, float, float]:
  """Median of the turns' differences over the median step alone, and its 95% interval."""
  drawn = np.random.default_rng(0).integers(0, len(alone_s), (10_000, len(alone_s)))
  difference_s = with_all_s - alone_s
  low_s, high_s = np.quantile(np.median(difference_s[drawn], axis=1), [0.025, 0.975])
  step_s = float(np.median(alone_s))
  return float(np.median(difference_s)) / step_s, float(low_s) / step_s, float(high_s) / step_s


def main() -> None:
  parser = Parser('experiments.balance.metric_cost', __doc__)
  parser.add_argument('--balance', default='loss_free')
  parser.add_argument('--arg', default='h100')
  parser.add_argument('--repeats', type=int, default=200)
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
      for i in range(args.repeats + 3):
        for name, fn in list(compiled.items())[:: 1 if i % 2 else -1]:
          begun_s = time.perf_counter()
          state, metrics = fn(state, batch)
          jax.block_until_ready((state, metrics))
          taken_s[name].append(time.perf_counter() - begun_s)
  steady_s = {name: np.array(s[3:]) for name, s in taken_s.items()}
  for name, s in steady_s.items():
    low, median, high = np.quantile(s, [0.1, 0.5, 0.9]) * 1e3
    print(f'{name}: median {median:.2f} ms a step, 80% of them {low:.2f} to {high:.2f} ms')
  share, low, high = cost(*steady_s.values())
  print(f'all metrics of the router together: {share:.2%} of the step ({low:.2%} to {high:.2%})')


if __name__ == '__main__':
  main()
