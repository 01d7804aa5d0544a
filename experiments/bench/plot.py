"""python -m experiments.bench.plot --suite=attention [--out=docs/bench]

Time and bytes against length, from the rows of a kept result that have a length.
"""

import json
import pathlib

from experiments.bench import table
from experiments.command import Parser, one_of
from moe_jax.analysis.bench import cost_by_length


def main() -> None:
  parser = Parser('experiments.bench.plot', __doc__)
  kept = sorted(path.stem for path in table.RESULTS.glob('*.json'))
  about = f'one of {", ".join(kept)}'
  parser.add_argument('--suite', type=one_of(kept), required=True, help=about)
  out = pathlib.Path('docs/bench')
  parser.add_argument('--out', type=pathlib.Path, default=out, help='folder of the picture')
  args = parser.parse_args()
  result = json.loads((table.RESULTS / f'{args.suite}.json').read_text())
  args.out.mkdir(parents=True, exist_ok=True)
  cost_by_length(result).savefig(args.out / f'{args.suite}.png')


if __name__ == '__main__':
  main()
