"""Table and picture of runs whose learning rate rises until they break (experiments.balance.ramp).

  python -m moe_jax.analysis.ramp --runs=runs/ramp --out=docs/balance

writes ramp.json (numbers of every run) and ramp.png, and prints the table.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moe_jax.analysis import style
from moe_jax.analysis.method_runs import Records, markdown, read, rounded
from moe_jax.analysis.stability import stability

# N steps

SMOOTH = 9  # steps that a loss is a mean of
MEDIAN = 15  # steps that a gradient norm is a median of
FACTOR = 2.0  # times the gradient norm before the rate climbs: the run is broken
BASELINE = 'none'
COLOURS = ('#6B6B6B', '#0072B2', '#56B4E9', '#D55E00', '#E69F00', '#009E73')


def smooth(value_N: np.ndarray) -> np.ndarray:
  """Mean of the last `SMOOTH` steps, of fewer at the beginning."""
  sum_N = np.cumsum(np.concatenate([np.zeros(SMOOTH), value_N]))
  return (sum_N[SMOOTH:] - sum_N[:-SMOOTH]) / np.minimum(np.arange(len(value_N)) + 1, SMOOTH)


def breaks_at(grad_N: np.ndarray, rate_N: np.ndarray) -> int | None:
  """The first step whose gradient norm, a median of `MEDIAN` steps, is `FACTOR` times what it was.

  What it was is the median before the first stair, where the rate is flat. The loss tells less: it
  follows the text, half a nat up and down.
  """
  values, counts = np.unique(rate_N, return_counts=True)
  flat_N = rate_N == values[counts.argmax()]
  median_N = np.array(
    [np.median(grad_N[max(i - MEDIAN + 1, 0) : i + 1]) for i in range(len(grad_N))]
  )
  bad_N = ~(median_N <= FACTOR * np.median(grad_N[flat_N]))
  bad_N[: flat_N.nonzero()[0][-1] + 1] = False
  return int(bad_N.argmax()) if bad_N.any() else None


def numbers(record: dict[str, np.ndarray]) -> dict[str, float]:
  """What is said of one run; a run that never broke has the last step's learning rate."""
  loss_N, rate_N, grad_N = record['train/lm_loss'], record['train/lr'], record['train/grad_norm']
  at = breaks_at(grad_N, rate_N)
  calm = stability(loss_N, grad_N)
  half = len(loss_N) // 2
  return {
    'broke': at is not None,
    'broke_at_lr': rate_N[-1 if at is None else at],
    'loss_spikes': calm.loss_spikes_per_10k,
    'grad_spikes': calm.grad_spikes_per_10k,
    'not_finite': calm.not_finite,
    'largest_grad': np.nanmax(grad_N[half:]),
    'late_loss': np.nanmean(loss_N[half:]),
  }


def table(runs: Records) -> str:
  """Markdown: a row for each method, mean and deviation over its seeds."""
  head = (
    'method', 'seeds', 'gradients double at a rate of', f'against {BASELINE}, seed by seed',
    'gradient spikes per 10k steps', 'loss spikes per 10k steps', 'steps not finite',
    'largest gradient norm', f'loss of the second half against {BASELINE}',
  )  # fmt: skip
  rows = []
  of = {m: {seed: numbers(r) for seed, r in by_seed.items()} for m, by_seed in runs.items()}
  for method, found in of.items():
    base = {} if method == BASELINE else of.get(BASELINE, {})
    both = [(found[seed], base[seed]) for seed in sorted(found) if seed in base]
    gains = [f['broke_at_lr'] / b['broke_at_lr'] - 1 for f, b in both]
    worse = [f['late_loss'] - b['late_loss'] for f, b in both]
    column = lambda name, form, f=found: _spread([x[name] for x in f.values()], form)
    rows.append((
      method, str(len(found)), column('broke_at_lr', '.4f'),
      ', '.join(f'{gain:+.0%}' for gain in gains), column('grad_spikes', '.0f'),
      column('loss_spikes', '.0f'), column('not_finite', '.0f'), column('largest_grad', '.0f'),
      _spread(worse, '+.3f') if worse else '',
    ))  # fmt: skip
  return markdown(head, rows)


def _spread(values: Sequence[float], form: str) -> str:
  return f'{np.mean(values):{form}} ± {np.std(values):{form.lstrip("+")}}'


@style.styled
def over_steps(runs: Records) -> Figure:
  """Loss and gradient norm while the rate climbs: mean and largest over the seeds of a method."""
  fig, (loss, grad) = style.panels(5.6, rows=2, share=False)
  order = [BASELINE, *sorted(set(runs) - {BASELINE})]
  for i, method in enumerate(order):
    records, colour = runs[method].values(), COLOURS[i % len(COLOURS)]
    mean_N = np.mean([smooth(r['train/lm_loss']) for r in records], axis=0)
    largest_N = np.max([r['train/grad_norm'] for r in records], axis=0)
    loss.plot(mean_N, color=colour, linewidth=1.3, label=method)
    grad.plot(largest_N, color=colour, linewidth=0.9, alpha=0.8, label=method)
  rate_N = next(iter(runs[BASELINE].values()))['train/lr']
  # steps at which the rate has doubled, from where it is flat
  ticks = [int(np.argmax(rate_N >= rate_N.max() * 0.999 / 2**k)) for k in (4, 3, 2, 1, 0)]
  for axes in (loss, grad):
    axes.set_xticks(ticks, [f'{rate_N[t]:.2g}' for t in ticks])
  loss.set(ylabel=f'loss, mean of {SMOOTH} steps', ylim=(None, 7))
  grad.set(ylabel='gradient norm, largest of seeds', yscale='log', xlabel='learning rate, by step')
  loss.legend(loc='upper left', bbox_to_anchor=(1.01, 1))
  spikes = {m: np.mean([numbers(r)['grad_spikes'] for r in runs[m].values()]) for m in order}
  broke = {m: np.mean([numbers(r)['broke_at_lr'] for r in runs[m].values()]) for m in order}
  rates = f'{min(broke.values()):.4f} to {max(broke.values()):.4f}'
  others = [spikes[m] for m in order if m != BASELINE]
  finding = (
    f'Gradients double at learning rates of {rates}, {broke[BASELINE]:.4f} with {BASELINE}; spikes '
    f'per 10k steps: {spikes[BASELINE]:.0f} with {BASELINE}, {min(others):.0f} to '
    f'{max(others):.0f} with the others'
  )
  return style.title(fig, finding)


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m moe_jax.analysis.ramp')
  parser.add_argument('--runs', type=Path, required=True)
  parser.add_argument('--out', type=Path, required=True)
  args = parser.parse_args()
  runs = read(args.runs, 'ramp-')
  if BASELINE not in runs:
    parser.error(f'--runs={args.runs} has no run ramp-{BASELINE}-SEED.npz to compare with.')
  args.out.mkdir(parents=True, exist_ok=True)
  results = json.dumps(rounded(runs, numbers), indent=1)
  (args.out / 'ramp.json').write_text(results + '\n')
  over_steps(runs).savefig(args.out / 'ramp.png')
  print(table(runs))


if __name__ == '__main__':
  main()
