"""Tables and pictures of a comparison of balancing methods, from its runs' records.

  python -m moe_jax.analysis.balance --runs=runs/balance --out=docs/balance

writes tables.md, results.json (numbers of every run) and pictures.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_jax.analysis import method_runs, style
from moe_jax.analysis.method_runs import Records, markdown, rounded
from moe_jax.analysis.stability import stability

# S seeds  B batches of validation text

BASELINE = 'aux 1e-3'
GLOBAL = 50  # last steps summed for a training run's global MaxVio
LAST = 20  # steps that a value at the end is a mean of
COLOURS = (
  '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#6B6B6B', '#222222',
  '#AA4499', '#999933',
)  # fmt: skip


def read(folder: Path, arg: str) -> Records:
  """Every run of one setting of the config; methods in the order of their MaxVio, worst first."""
  found = method_runs.read(folder, f'{arg}-')
  uneven = {
    m: np.mean([numbers(r)['max_vio_global'] for r in by.values()]) for m, by in found.items()
  }
  return {method: found[method] for method in sorted(found, key=lambda m: -uneven[m])}


def numbers(record: dict[str, np.ndarray]) -> dict[str, float]:
  """What the tables say of one run. Means over layers, unless a name says otherwise."""
  load_LE = record['load_LE']
  vio_L = load_LE.max(-1) / load_LE.mean(-1) - 1
  calm = stability(record['train/lm_loss'], record['train/grad_norm'])
  longer = {}
  if 'load_NLE' in record:
    longer = {'max_vio_longer': max_vio_by_steps(record['load_NLE'])[1][-1]}
  return longer | {
    'loss': record['eval_loss'][-1].mean(),
    'max_vio_validation': record['eval/max_vio_global'][-1].mean(),
    'domain_information': record['eval/domain_information'][-1].mean(),
    'training_loss': np.nanmean(record['train/lm_loss'][-LAST:]),
    'max_vio_batch': record['router/max_vio'][-LAST:].mean(),
    'max_vio_global': vio_L.mean(),
    'max_vio_global_worst': vio_L.max(),
    'dead_experts': record['router/dead_experts'][-LAST:].mean(),
    'loss_spikes': calm.loss_spikes_per_10k,
    'grad_spikes': calm.grad_spikes_per_10k,
    'not_finite': calm.not_finite,
    'seconds': record['seconds'],
  }


def interval(
  loss_SB: np.ndarray, base_SB: np.ndarray, *, draws: int = 10_000
) -> tuple[float, float, float]:
  """Mean difference of loss, paired by seed and batch, and its 95% bootstrap interval.

  Seeds are drawn anew, then batches within them; with three seeds the interval is rough.
  """
  difference_SB = loss_SB - base_SB
  S, B = difference_SB.shape
  rng = np.random.default_rng(0)
  seed_NS = rng.integers(0, S, (draws, S))
  batch_NB = rng.integers(0, B, (draws, B))
  mean_N = difference_SB[seed_NS[:, :, None], batch_NB[:, None, :]].mean((1, 2))
  low, high = np.quantile(mean_N, [0.025, 0.975])
  return float(difference_SB.mean()), float(low), float(high)


def paired(records: Records, method: str, baseline: str) -> tuple[float, float, float] | None:
  """The interval of a method against the baseline, over the seeds that both have."""
  both = sorted(set(records[method]) & set(records.get(baseline, {})))
  if not both or method == baseline:
    return None
  loss_SB, base_SB = (
    np.stack([records[name][seed]['eval_loss'][-1] for seed in both]) for name in (method, baseline)
  )
  return interval(loss_SB, base_SB)


def _spread(values: Sequence[float], digits: int) -> str:
  if not values:
    return ''
  mean = np.mean(values)
  return f'{mean:.{digits}f}' + (f' ± {np.std(values):.{digits}f}' if len(values) > 1 else '')


def table(records: Records, baseline: str) -> str:
  """Markdown: a row for each method, mean and deviation over seeds."""
  head = (
    'method', 'validation loss', f'against {baseline} (95%)', 'MaxVio, batch', 'MaxVio, global',
    'MaxVio, 200 steps', 'MaxVio, validation', 'dead experts a layer', 'domain bits',
  )  # fmt: skip
  rows = []
  for method, by_seed in records.items():
    found = [numbers(r) for r in by_seed.values()]
    column = lambda name, digits, f=found: _spread([x[name] for x in f], digits)
    found_interval = paired(records, method, baseline)
    text = ''
    if found_interval:
      mean, low, high = found_interval
      noise = ', within noise' if low <= 0 <= high else ''
      text = f'{mean:+.4f} ({low:+.4f} to {high:+.4f}){noise}'
    rows.append((
      method, column('loss', 4), text, column('max_vio_batch', 3), column('max_vio_global', 3),
      _spread([f['max_vio_longer'] for f in found if 'max_vio_longer' in f], 3),
      column('max_vio_validation', 3), column('dead_experts', 1), column('domain_information', 3),
    ))  # fmt: skip
  return markdown(head, rows)


def stability_table(records: Records) -> str:
  head = ('method', 'loss spikes per 10k steps', 'gradient spikes per 10k steps',
          'steps not finite', 'training loss at the end')  # fmt: skip
  rows = []
  for method, by_seed in records.items():
    found = [numbers(r) for r in by_seed.values()]
    column = lambda name, digits, f=found: _spread([x[name] for x in f], digits)
    rows.append((method, column('loss_spikes', 0), column('grad_spikes', 0),
                 column('not_finite', 0), column('training_loss', 3)))  # fmt: skip
  return markdown(head, rows)


def _legend(beside: Axes, of: Axes | None = None) -> None:
  """Names of the lines, right of the axes."""
  handles, labels = (of or beside).get_legend_handles_labels()
  beside.legend(handles, labels, loc='upper left', bbox_to_anchor=(1.01, 1))


@style.styled
def balance_against_loss(records: Records) -> Figure:
  """Every run a dot: how uneven its experts are at the end, and its validation loss."""
  fig, (axes,) = style.panels(4.4)
  points = {m: [numbers(r) for r in by_seed.values()] for m, by_seed in records.items()}
  for i, (method, found) in enumerate(points.items()):
    x, y = ([f[name] for f in found] for name in ('max_vio_global', 'loss'))
    axes.plot(x, y, 'o', color=COLOURS[i % len(COLOURS)], alpha=0.8, label=method)
  axes.set_xscale('log')
  plain = FuncFormatter(lambda x, _: f'{x:g}')
  axes.xaxis.set_major_formatter(plain)
  axes.xaxis.set_minor_formatter(
    FuncFormatter(lambda x, _: f'{x:g}' if f'{x:e}'[0] in '25' else '')
  )
  axes.set(xlabel='MaxVio of the last 50 steps together', ylabel='validation loss, nats per token')
  _legend(axes)
  mean = {m: {k: np.mean([f[k] for f in found]) for k in found[0]} for m, found in points.items()}
  best = min(mean, key=lambda m: mean[m]['loss'])
  evenest = min(mean, key=lambda m: mean[m]['max_vio_global'])
  finding = (
    f'{best} has the lowest loss, {mean[best]["loss"]:.3f}; {evenest} the most even experts, '
    f'MaxVio {mean[evenest]["max_vio_global"]:.3f}'
  )
  return style.title(fig, finding)


@style.styled
def balance_over_time(records: Records) -> Figure:
  """MaxVio of every batch, mean over layers and seeds."""
  fig, (axes,) = style.panels(4.2)
  ends = {}
  for i, (method, by_seed) in enumerate(records.items()):
    curve_N = np.mean([r['router/max_vio'] for r in by_seed.values()], axis=0)
    kernel = np.ones(9) / 9
    smooth_N = np.convolve(np.pad(curve_N, 4, mode='edge'), kernel, 'valid')
    axes.plot(smooth_N, color=COLOURS[i % len(COLOURS)], linewidth=1.4, label=method)
    ends[method] = curve_N[-LAST:].mean()
  axes.set(xlabel='step (mean of 9)', ylabel='MaxVio of the batch', yscale='log')
  _legend(axes)
  for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
    set_formatter(FuncFormatter(lambda y, _: f'{y:g}' if f'{y:e}'[0] in '125' else ''))
  worst, best = max(ends, key=lambda m: ends[m]), min(ends, key=lambda m: ends[m])
  finding = f'MaxVio ends at {ends[worst]:.1f} with {worst} and at {ends[best]:.2f} with {best}'
  return style.title(fig, finding)


def max_vio_by_steps(load_NLE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Numbers of last steps, and the MaxVio of each number's loads together, mean over layers."""
  total_NLE = load_NLE[::-1].cumsum(0, dtype=np.float64)
  vio_N = (total_NLE.max(-1) / total_NLE.mean(-1) - 1).mean(-1)
  return np.arange(1, len(vio_N) + 1), vio_N


@style.styled
def balance_by_steps(records: Records) -> Figure:
  """How far uneven loads of single steps even out: chance falls as one over the root of steps."""
  fig, (axes,) = style.panels(4.2)
  ends = {}
  for i, (method, by_seed) in enumerate(records.items()):
    curves = [max_vio_by_steps(r['load_NLE']) for r in by_seed.values() if 'load_NLE' in r]
    if not curves:
      continue
    steps_N, vio_N = curves[0][0], np.mean([vio_N for _, vio_N in curves], axis=0)
    axes.plot(steps_N, vio_N, color=COLOURS[i % len(COLOURS)], label=method)
    axes.plot(
      steps_N, vio_N[0] / np.sqrt(steps_N), color=COLOURS[i % len(COLOURS)], ls=':', linewidth=1
    )
    ends[method] = vio_N
  axes.set(xlabel='last steps summed (dotted: by chance)', ylabel='MaxVio', xscale='log')
  axes.set_yscale('log')
  plain = FuncFormatter(lambda x, _: f'{x:g}' if f'{x:e}'[0] in '125' else '')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(plain)
  _legend(axes)
  evenest = min(ends, key=lambda m: ends[m][-1])
  finding = (
    f'{evenest}: MaxVio {ends[evenest][0]:.2f} of one step, {ends[evenest][GLOBAL - 1]:.3f} of '
    f'{GLOBAL}, {ends[evenest][-1]:.3f} of {len(ends[evenest])}'
  )
  return style.title(fig, finding)


@style.styled
def specialisation(records: Records) -> Figure:
  """Bits that an expert tells of its token's domain at the end: mean, and every run a dot."""
  bits = {
    method: [numbers(r)['domain_information'] for r in by_seed.values()]
    for method, by_seed in records.items()
  }
  order = sorted(bits, key=lambda m: np.mean(bits[m]))
  fig, (axes,) = style.panels(0.9 + 0.34 * len(order))
  axes.barh(order, [np.mean(bits[m]) for m in order], color='#BBD7EA', height=0.6)
  for method in order:
    axes.plot(bits[method], [method] * len(bits[method]), 'o', color=style.BLUE, markersize=4)
  axes.set_xlabel('mutual information of expert and domain, bits (six equal domains: 2.58)')
  axes.xaxis.set_major_locator(MaxNLocator(5))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
  axes.grid(axis='y', visible=False)
  finding = (
    f'Experts specialise most with {order[-1]} ({np.mean(bits[order[-1]]):.2f} bits of the '
    f'domain), least with {order[0]} ({np.mean(bits[order[0]]):.2f})'
  )
  return style.title(fig, finding)


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m moe_jax.analysis.balance')
  parser.add_argument('--runs', type=Path, required=True)
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument('--baseline', default=BASELINE)
  args = parser.parse_args()
  records = read(args.runs, 'h100') or read(args.runs, 'tiny')
  if not records:
    parser.error(f'--runs={args.runs} has no run h100-METHOD-SEED.npz, nor one of tiny.')
  args.out.mkdir(parents=True, exist_ok=True)
  parts = [table(records, args.baseline), stability_table(records)]
  (args.out / 'tables.md').write_text('\n\n'.join(parts) + '\n')
  results: dict[str, Any] = {'runs': rounded(records, numbers)}
  (args.out / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
  drawn = {
    'loss': balance_against_loss(records),
    'max_vio': balance_over_time(records),
    'specialisation': specialisation(records),
  }
  if any('load_NLE' in r for by_seed in records.values() for r in by_seed.values()):
    drawn['steps'] = balance_by_steps(records)
  for name, figure in drawn.items():
    figure.savefig(args.out / f'{name}.png')
  print('\n\n'.join(parts))


if __name__ == '__main__':
  main()
