"""Table and picture of balancing methods under learning rates that are too high.

  python -m moe_jax.analysis.stress --runs=runs/stress --out=docs/balance [--arg=climb]

of runs by `experiments.balance.ramp --arg=stress` or climb; writes ARG.json (numbers of every run)
and ARG.png, and prints the table and what balancing saves in spikes.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from moe_jax.analysis import style
from moe_jax.analysis.method_runs import Records, markdown, read, rounded
from moe_jax.analysis.ramp import BASELINE, COLOURS, SMOOTH, smooth
from moe_jax.analysis.stability import GRAD_FACTOR, MIN_STEPS, WINDOW, stability

# N steps  M methods  S seeds

LAST = 20  # steps that a loss is a mean of
RISE = 0.5  # nats above the lowest such loss: the run has diverged
CLAIMED = 0.15  # of the spikes, that balancing saves
LINES = (*COLOURS, '#CC79A7')


def diverged(loss_N: np.ndarray) -> bool:
  """A loss that is not finite, or ends far above where it was."""
  if not np.isfinite(loss_N).all():
    return True
  mean_N = np.convolve(loss_N, np.ones(LAST) / LAST, 'valid')
  return bool(mean_N[-1] > mean_N.min() + RISE)


def numbers(record: dict[str, np.ndarray]) -> dict[str, float]:
  """What is said of one run. Spikes are counts, not rates."""
  loss_N, grad_N = record['train/lm_loss'], record['train/grad_norm']
  calm, late_N = stability(loss_N, grad_N), np.arange(len(grad_N)) >= len(grad_N) // 10
  return {
    'steps': calm.steps,
    'loss_spikes': calm.loss_spikes,
    'grad_spikes': calm.grad_spikes,
    'not_finite': calm.not_finite,
    'diverged': diverged(loss_N),
    'largest_grad': np.max(grad_N, where=np.isfinite(grad_N) & late_N, initial=0.0),
    'lr_of_first_spike': record['train/lr'][first_spike(grad_N)],
    'loss': np.nanmean(loss_N[-LAST:]),
    'max_vio': record['router/max_vio'][-LAST:].mean(),
  }


def first_spike(grad_N: np.ndarray) -> int:
  """The first step that is not finite or has a gradient spike; the last step where none has."""
  for i in range(MIN_STEPS, len(grad_N)):
    if not grad_N[i] <= GRAD_FACTOR * np.median(grad_N[max(i - WINDOW, 0) : i]):
      return i
  return len(grad_N) - 1


def per_10k(found: dict[str, float], *kinds: str) -> float:
  return sum(found[f'{kind}_spikes'] for kind in kinds) * 1e4 / found['steps']


def saved(runs: Records, *, draws: int = 10_000) -> tuple[float, float, float] | None:
  """Share of the baseline's spikes, of loss and gradient, that balancing saves; its 95% interval.

  The mean of all other methods against the baseline, over the seeds that all have; seeds are drawn
  anew. None where the baseline has no spike: there is nothing to save.
  """
  seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs.values())))
  spikes = lambda method: [per_10k(numbers(runs[method][s]), 'loss', 'grad') for s in seeds]
  base_S = np.array(spikes(BASELINE))
  others_S = np.mean([spikes(m) for m in runs if m != BASELINE], axis=0)
  if not base_S.any():
    return None
  share = float(1 - others_S.sum() / base_S.sum())
  if len(seeds) == 1:
    return share, -np.inf, np.inf
  drawn = np.random.default_rng(0).integers(0, len(seeds), (draws, len(seeds)))
  base_N, others_N = base_S[drawn].sum(1), others_S[drawn].sum(1)
  share_N = 1 - others_N[base_N > 0] / base_N[base_N > 0]
  low, high = np.quantile(share_N, [0.025, 0.975])
  return share, float(low), float(high)


def table(runs: Records) -> str:
  """Markdown: a row for each method, mean and deviation over its seeds."""
  head = (
    'method', 'seeds', 'loss spikes per 10k steps', 'gradient spikes per 10k steps',
    'steps not finite', 'diverged', 'spikes from a rate of', f'against {BASELINE}, by seed',
    'largest gradient norm', 'loss at the end', 'MaxVio, batch',
  )  # fmt: skip
  rows = []
  base = {seed: numbers(r)['lr_of_first_spike'] for seed, r in runs[BASELINE].items()}
  for method, by_seed in runs.items():
    found = [numbers(record) for record in by_seed.values()]
    gains = [
      x['lr_of_first_spike'] / base[seed] - 1
      for seed, x in zip(by_seed, found, strict=True)
      if seed in base and method != BASELINE
    ]
    spread = lambda values, form: f'{np.mean(values):{form}} ± {np.std(values):{form}}'
    column = lambda name, form, f=found, spread=spread: spread([x[name] for x in f], form)
    rows.append((
      method, str(len(found)), spread([per_10k(x, 'loss') for x in found], '.0f'),
      spread([per_10k(x, 'grad') for x in found], '.0f'), f'{sum(x["not_finite"] for x in found)}',
      f'{sum(x["diverged"] for x in found)} of {len(found)}', column('lr_of_first_spike', '.4f'),
      ', '.join(f'{gain:+.0%}' for gain in gains), f'{max(x["largest_grad"] for x in found):.2g}',
      column('loss', '.3f'),
      column('max_vio', '.2f'),
    ))  # fmt: skip
  return markdown(head, rows)


def verdict(runs: Records) -> str:
  """One sentence on the claim."""
  found = saved(runs)
  if found is None:
    return 'Without balancing no step spikes: nothing is left to save'
  share, low, high = found
  holds = 'holds' if low > 0 and share >= CLAIMED else 'is not shown'
  known = f'{low:.0%} to {high:.0%}' if np.isfinite(low) else 'one seed, no interval'
  does = f'saves {share:.0%}' if share >= 0 else f'adds {-share:.0%}'
  return f'Balancing {does} of the spikes ({known}): the claim of {CLAIMED:.0%} {holds}'


@style.styled
def over_steps(runs: Records) -> Figure:
  """Loss, mean over seeds, and gradient norm, the largest of seeds."""
  fig, (loss, grad) = style.panels(5.6, rows=2)
  for i, (method, by_seed) in enumerate(runs.items()):
    records, colour = by_seed.values(), LINES[i % len(LINES)]
    mean_N = np.mean([smooth(r['train/lm_loss']) for r in records], axis=0)
    largest_N = np.max([r['train/grad_norm'] for r in records], axis=0)
    loss.plot(mean_N, color=colour, linewidth=1.3, label=method)
    grad.plot(largest_N, color=colour, linewidth=0.9, alpha=0.8, label=method)
  loss.set(ylabel=f'loss, mean of {SMOOTH} steps')
  grad.set(ylabel='gradient norm, largest of seeds', yscale='log', xlabel='step')
  grad.yaxis.set_major_locator(LogLocator())
  loss.legend(loc='upper left', bbox_to_anchor=(1.01, 1))
  return style.title(fig, verdict(runs))


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m moe_jax.analysis.stress')
  parser.add_argument('--runs', type=Path, required=True)
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument('--arg', default='stress', help='of the config: stress or climb')
  args = parser.parse_args()
  found = read(args.runs, f'{args.arg}-')
  if BASELINE not in found:
    parser.error(f'--runs={args.runs} has no run {args.arg}-{BASELINE}-SEED.npz to compare with.')
  args.out.mkdir(parents=True, exist_ok=True)
  runs = {m: found[m] for m in (BASELINE, *sorted(set(found) - {BASELINE}))}
  (args.out / f'{args.arg}.json').write_text(json.dumps(rounded(runs, numbers), indent=1) + '\n')
  over_steps(runs).savefig(args.out / f'{args.arg}.png')
  print(f'{table(runs)}\n\n{verdict(runs)}')


if __name__ == '__main__':
  main()
