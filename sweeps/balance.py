"""Balancing ideas side by side: the same model, data order and seeds under each.

python -m sweeps.run --sweep=sweeps/balance.py --jobs=2 --workdir=runs/sweeps/balance
"""

from collections.abc import Iterator

from sweeps import space

CONFIG = 'experiments/configs/quickstart.py'


def sweep() -> Iterator[space.Overrides]:
  ideas = ['none', 'expert_level', 'sequence_wise', 'loss_free', 'loss_free+sequence_wise']
  yield from space.grid({'seed': range(3), 'balance': ideas})
