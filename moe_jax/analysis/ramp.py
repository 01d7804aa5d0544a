"""Table and picture of runs whose learning rate rises until they break (experiments.balance.ramp).

  python -m moe_jax.analysis.ramp --runs=runs/ramp --out=docs/balance

writes ramp.json (numbers of every run) and ramp.png, and prints the table.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moe_jax.analysis import style
from moe_jax.analysis.stability import stability

# N steps

SMOOTH = 9  # steps that a loss is a mean of
RISE = 0.5  # nats above the lowest so far: the run is broken
BASELINE = 'none'
Runs = dict[str, dict[int, dict[str, np.ndarray]]]  # by method, by seed


def read(folder: Path) -> Runs:
  found: Runs = {}
  for path in sorted(folder.glob('*.npz')):
    method, seed = path.stem.rsplit('-', 1)
    with np.load(path) as file:
      found.setdefault(method, {})[int(seed)] = dict(file)
  return found


def smooth(value_N: np.ndarray) -> np.ndarray:
  """Mean of the last `SMOOTH` steps, of fewer at the beginning."""
  sum_N = np.cumsum(np.concatenate([np.zeros(SMOOTH), value_N]))
  return (sum_N[SMOOTH:] - sum_N[:-SMOOTH]) / np.minimum(np.arange(len(value_N)) + 1, SMOOTH)


def breaks_at(loss_N: np.ndarray) -> int | None:
  """The first step at which the smoothed loss is not finite, or `RISE` above its lowest so far."""
  smooth_N = smooth(loss_N)
  bad_N = ~np.isfinite(smooth_N) | (smooth_N > np.fmin.accumulate(smooth_N) + RISE)
  return int(bad_N.argmax()) if bad_N.any() else None


def numbers(record: dict[str, np.ndarray]) -> dict[str, float]:
  """What is said of one run; a run that never broke has the last step's learning rate."""
  loss_N, rate_N = record['train/lm_loss'], record['train/lr']
  at = breaks_at(loss_N)
  calm = stability(loss_N, record['train/grad_norm'])
  return {
    'broke': at is not None,
    'broke_at_lr': rate_N[-1 if at is None else at],
    'lowest_loss': np.nanmin(smooth(loss_N)),
    'lowest_at_lr': rate_N[np.nanargmin(smooth(loss_N))],
    'loss_spikes': calm.loss_spikes_per_10k,
    'grad_spikes': calm.grad_spikes_per_10k,
    'not_finite': calm.not_finite,
  }


def table(runs: Runs) -> str:
  """Markdown: a row for each method, mean and deviation over its seeds."""
  head = (
    'method', 'runs that broke', 'at a learning rate of', f'against {BASELINE}, by seed',
    'loss spikes per 10k steps', 'gradient spikes per 10k steps', 'lowest loss',
  )  # fmt: skip
  rows = [head, ('---',) * len(head)]
  for method, by_seed in runs.items():
    found = {seed: numbers(record) for seed, record in by_seed.items()}
    base = {seed: numbers(record) for seed, record in runs.get(BASELINE, {}).items()}
    gains = [found[s]['broke_at_lr'] / base[s]['broke_at_lr'] - 1 for s in found if s in base]
    against = '' if method == BASELINE else ', '.join(f'{gain:+.0%}' for gain in gains)

    def column(name: str, form: str, found=found) -> str:
      values = [f[name] for f in found.values()]
      return f'{np.mean(values):{form}} ± {np.std(values):{form}}'

    broke = sum(f['broke'] for f in found.values())
    rows.append((
      method, f'{broke:.0f} of {len(found)}', column('broke_at_lr', '.4f'), against,
      column('loss_spikes', '.0f'), column('grad_spikes', '.0f'), column('lowest_loss', '.3f'),
    ))  # fmt: skip
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


@style.styled
def loss_by_rate(runs: Runs) -> Figure:
  """Smoothed loss against the learning rate, each run a line, and where it broke a dot."""
  fig, (axes,) = style.panels(4.2)
  where = {}
  for i, (method, by_seed) in enumerate(runs.items()):
    found = [numbers(record) for record in by_seed.values()]
    where[method] = float(np.mean([f['broke_at_lr'] for f in found]))
    for number, record in enumerate(by_seed.values()):
      loss_N, rate_N, at = smooth(record['train/lm_loss']), record['train/lr'], None
      axes.plot(
        rate_N, loss_N, color=f'C{i}', linewidth=1, alpha=0.8, label=None if number else method
      )
      at = breaks_at(record['train/lm_loss'])
      if at is not None:
        axes.plot(rate_N[at], loss_N[at], 'o', color=f'C{i}', markersize=5)
  axes.set(xlabel='learning rate, rising with the steps', ylabel=f'loss, mean of {SMOOTH} steps')
  axes.legend(loc='upper left', bbox_to_anchor=(1.01, 1))
  first, last = min(where, key=lambda m: where[m]), max(where, key=lambda m: where[m])
  finding = (
    f'{first} breaks first, at a learning rate of {where[first]:.4f}; {last} last, at '
    f'{where[last]:.4f}'
  )
  return style.title(fig, finding)


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m moe_jax.analysis.ramp')
  parser.add_argument('--runs', type=Path, required=True)
  parser.add_argument('--out', type=Path, required=True)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  runs = read(args.runs)
  results = {
    method: {
      seed: {name: round(float(v), 5) for name, v in numbers(record).items()}
      for seed, record in by_seed.items()
    }
    for method, by_seed in runs.items()
  }
  (args.out / 'ramp.json').write_text(json.dumps(results, indent=1) + '\n')
  loss_by_rate(runs).savefig(args.out / 'ramp.png')
  print(table(runs))


if __name__ == '__main__':
  main()
