"""python -m experiments.bench --suite=grouped_matmul [--out=FOLDER] [--only=TEXT] [--turns=FILE]

On a GPU the rows are kept in experiments/bench/results/<suite>.json. Elsewhere the suite runs tiny
shapes, to show that it works, and keeps nothing. A selection by --only is kept in a folder given by
--out alone, where it takes the place of the same rows and leaves the others.

Processes with the same --turns compile at once and are timed one after another.
"""

import importlib
import os
import pathlib
import pkgutil

# torch's rows run in the same process and need memory too
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax

from experiments.bench import suites, table, timing
from experiments.command import Parser, one_of


def main() -> None:
  names = sorted(module.name for module in pkgutil.iter_modules(suites.__path__))
  parser = Parser('experiments.bench', __doc__)
  about = f'one of {", ".join(names)}'
  parser.add_argument('--suite', type=one_of(names), required=True, help=about)
  parser.add_argument('--out', type=pathlib.Path, default=table.RESULTS, help='folder of results')
  parser.add_argument('--only', default='', help='shapes whose name contains this text')
  parser.add_argument('--turns', type=pathlib.Path, help='a lock file, held while a row is timed')
  args = parser.parse_args()
  timing.turns = args.turns
  suite = importlib.import_module(f'experiments.bench.suites.{args.suite}')
  device = jax.devices()[0]
  if device.platform != 'gpu':
    print(f'{device.device_kind} is no GPU: tiny shapes, to see the suite work; nothing is kept.')
  rows = []
  for case in suite.run(args.only):
    table.show(case, f'{args.suite} on {device.device_kind}, jax {jax.__version__}')
    rows += case
    # after every case, so that an interrupted run keeps what it has
    if device.platform == 'gpu' and (args.out != table.RESULTS or not args.only):
      table.save(rows, args.suite, args.out, among=bool(args.only))


if __name__ == '__main__':
  main()
