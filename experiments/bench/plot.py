"""python -m experiments.bench.plot --suite=attention [--out=docs/bench]

Time and bytes against length, from the rows of a kept result that have a length.
"""

import argparse
import json
import pathlib

from experiments.bench import table
from moe_jax.analysis.bench import cost_by_length


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m experiments.bench.plot')
  parser.add_argument('--suite', required=True)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('docs/bench'))
  args = parser.parse_args()
  result = json.loads((table.RESULTS / f'{args.suite}.json').read_text())
  args.out.mkdir(parents=True, exist_ok=True)
  cost_by_length(result).savefig(args.out / f'{args.suite}.png')


if __name__ == '__main__':
  main()
