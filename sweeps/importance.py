"""The loss of notebook 5 at two weights, beside no balancing; two seeds.

python -m sweeps.run --sweep=sweeps/importance.py --jobs=2 --workdir=runs/sweeps/importance
"""

from collections.abc import Iterator

from sweeps import space

CONFIG = 'notebooks/importance.py'


def sweep() -> Iterator[space.Overrides]:
  ours = space.grid({'balance': ['importance'], 'routing.importance.weight': [0.1, 1.0]})
  yield from space.grid(space.chain([{'balance': 'none'}], ours), {'seed': range(2)})
