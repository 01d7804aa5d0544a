"""Four ways of balancing the small model, three seeds each: the runs of notebook 2.

python -m sweeps.run --sweep=sweeps/small_balance.py --jobs=2 --workdir=runs/sweeps/small_balance
"""

from collections.abc import Iterator

from sweeps import space

CONFIG = 'experiments/configs/small.py'


def sweep() -> Iterator[space.Overrides]:
  ideas = ['none', 'switch', 'sequence_wise', 'loss_free']
  yield from space.grid({'balance': ideas, 'seed': range(3)}, {'steps': [80]})
