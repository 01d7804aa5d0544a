"""Searches the learning rate and the speed of the selection bias; runs that lag are pruned.

python -m sweeps.run --sweep=sweeps/learning_rate.py --jobs=2 --workdir=runs/sweeps/learning_rate
"""

from sweeps import space

CONFIG = 'experiments/configs/quickstart.py'
TRIALS = 20


def search(trial) -> space.Overrides:
  return {
    'optim.lr_peak': trial.suggest_float('lr_peak', 3e-4, 2e-2, log=True),
    'routing.loss_free.rate': trial.suggest_float('rate', 1e-3, 1e-1, log=True),
    'eval.interval_steps': 25,
  }
