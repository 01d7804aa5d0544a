"""The pictures of a run: pure functions from its metrics to a matplotlib Figure.

Each title states what the picture shows, with the numbers computed from it. A function returns
None where the run recorded nothing to draw.
"""

# N recorded steps  L MoE layers  E experts

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_jax.analysis import style
from moe_jax.analysis.style import BLUE, GREEN, GREY, ORANGE
from moe_jax.train.metrics import Metrics

MAX_PANELS = 12  # heat maps in one picture
MAX_COLUMNS = 400  # moments in one heat map; longer runs are averaged down to these


@style.styled
def loss_figure(metrics: Metrics, summary: Mapping[str, Any]) -> Figure | None:
  """Training and validation loss, beside the loss of guessing by token frequency alone."""
  name = 'train/lm_loss' if 'train/lm_loss' in metrics else 'train/loss'
  if name not in metrics:
    return None
  unigram = (summary.get('eval') or {}).get('unigram_loss')
  steps, loss = metrics.series(name)
  smoothed, window = smooth(np.where(_refused(metrics, steps), np.nan, loss))
  fig, (axes,) = style.panels(4.2)
  axes.plot(steps, loss, color=BLUE, alpha=0.25, linewidth=0.8, **style.dots(loss))
  label = f'training, mean of {window} steps' if window > 1 else 'training'
  axes.plot(steps, smoothed, color=BLUE, linewidth=1.8, label=label, **style.dots(smoothed))
  subject, told, in_view = 'Training loss', smoothed, [smoothed]
  if 'eval/loss' in metrics:
    at, valid = metrics.series('eval/loss')
    size = 4 if len(at) <= 40 else 0  # dots that touch hide what is under them
    axes.plot(
      at, valid, color=ORANGE, linewidth=1.2, marker='o', markersize=size, label='validation'
    )
    subject, told = 'Validation loss', valid
    in_view.append(valid)
  told = told[np.isfinite(told)]
  finding = f'{subject} {_change(told[0], told[-1])}' if told.size else f'{subject} is never finite'
  if unigram is not None:
    style.rule(axes, unigram, f'unigram {unigram:.2f}')
    in_view.append(np.array([unigram]))
    if told.size:
      side = 'below' if told[-1] < unigram else 'above'
      finding += f', {abs(told[-1] - unigram):.2f} {side} the unigram baseline'
  # one refused step with a loss of 1e4 must not flatten everything else
  seen = np.concatenate(in_view)
  seen = seen[np.isfinite(seen)]
  if seen.size and np.ptp(seen) > 0:
    axes.set_ylim(seen.min() - 0.08 * np.ptp(seen), seen.max() + 0.08 * np.ptp(seen))
  axes.set(xlabel='step', ylabel='loss, nats per token')
  axes.legend(loc='upper right')
  return style.title(fig, finding)


@style.styled
def load_figure(metrics: Metrics, *, first_layer: int = 0) -> Figure | None:
  """Load of every expert over time, one heat map a layer, as a multiple of the layer's mean.

  Args:
    first_layer: index in the model of the first layer with experts, for the labels.
  """
  if 'router/load' not in metrics:
    return None
  steps, load_NLE = metrics.series('router/load')
  if not load_NLE.size:
    return None
  mean_NL1 = load_NLE.mean(-1, keepdims=True)
  load_NLE = np.divide(load_NLE, mean_NL1, out=np.ones_like(load_NLE), where=mean_NL1 > 0)
  _, L, E = load_NLE.shape
  shown = np.unique(np.linspace(0, L - 1, min(L, MAX_PANELS)).round().astype(int))
  # four in a square
  num_columns = 2 if len(shown) == 4 else min(len(shown), 3 if len(shown) <= 6 else 4)
  num_rows = -(-len(shown) // num_columns)
  height = 1.1 + num_rows * (2.6 if num_rows == 1 else 1.9)
  fig, grid = style.panels(height, rows=num_rows, columns=num_columns, share=True)
  edges, binned_NLE = _columns(steps, load_NLE)
  norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=2)
  for axes, layer in zip(grid, shown, strict=False):
    load_EN = binned_NLE[:, layer].T
    axes.pcolormesh(edges, np.arange(E + 1) - 0.5, load_EN, cmap='RdBu_r', norm=norm)
    axes.set_title(f'layer {first_layer + layer}', pad=3)
    axes.set_yticks(range(0, E, max(1, E // 4)))
    axes.grid(False)
  for axes in grid[len(shown) :]:
    axes.remove()
  bar = fig.colorbar(
    ScalarMappable(norm, 'RdBu_r'),
    ax=grid[: len(shown)],
    extend='max' if binned_NLE.max() > 2 else 'neither',
    extendfrac=0.03,
    aspect=30,
    pad=0.02,
    ticks=[0, 0.5, 1, 1.5, 2],
  )
  bar.set_label('load / mean load')
  fig.supxlabel('step', color=GREY, fontsize=10)
  fig.supylabel('expert', color=GREY, fontsize=10)
  first, last = (f'{x.min():.2f}-{x.max():.2f}x' for x in (load_NLE[0], load_NLE[-1]))
  finding = f'Expert load spans {last} of the mean at step {steps[-1]}'
  if len(steps) > 1:
    verb = 'narrows' if np.ptp(load_NLE[-1]) < np.ptp(load_NLE[0]) else 'widens'
    finding = (
      f'Expert load {verb} from {first} of the mean at step {steps[0]} to {last} at {steps[-1]}'
    )
  if len(shown) < L:
    finding += f' ({len(shown)} of {L} layers shown)'
  return style.title(fig, finding)


@style.styled
def balance_figure(
  metrics: Metrics, summary: Mapping[str, Any], *, first_layer: int = 0
) -> Figure | None:
  """MaxVio (largest load / mean - 1; arXiv:2408.15664) and the gate's entropy, per layer."""
  if 'router/max_vio' not in metrics or 'router/entropy' not in metrics:
    return None
  steps, vio_NL = metrics.series('router/max_vio')
  entropy_at, entropy_NL = metrics.series('router/entropy')
  L = vio_NL.shape[1]
  if not L:
    return None
  fig, (left, right) = style.panels(3.4, columns=2)
  window = 1
  for axes, at, value_NL in ((left, steps, vio_NL), (right, entropy_at, entropy_NL)):
    for layer in range(L):
      value_N, window = smooth(value_NL[:, layer])
      look = {'color': style.depth_colour(layer, L), 'linewidth': 1.4, **style.dots(value_N)}
      axes.plot(at, value_N, label=f'layer {first_layer + layer}', **look)
    axes.set_xlabel(f'step (curves: mean of {window} steps)' if window > 1 else 'step')
  left.set_title('MaxVio: busiest expert / mean - 1')
  style.log_scale(left, vio_NL)
  right.set_title('entropy of the gate / its maximum')
  right.set_ylim(top=1)
  _layer_key(fig, [left, right], first_layer, L)
  worst = np.max(summary.get('max_vio') or vio_NL[-1])
  finding = (
    f'MaxVio of the worst layer {_change(vio_NL[0].max(), worst)}; '
    f"the gate's entropy ends at {entropy_NL[-1].min():.3f} of its maximum"
  )
  if 'router/dead_experts' in metrics:
    dead = int(np.nansum(metrics.series('router/dead_experts')[1][-1]))
    finding += f'; {_count(dead, "dead expert")}'
  return style.title(fig, finding)


@style.styled
def optim_figure(metrics: Metrics, *, clip_norm: float | None = None) -> Figure | None:
  """Learning rate and gradient norm; refused steps are marked.

  Args:
    clip_norm: draws the norm above which gradients are scaled down.
  """
  if 'train/lr' not in metrics or 'train/grad_norm' not in metrics:
    return None
  fig, (top, bottom) = style.panels(4.6, rows=2)
  bottom.sharex(top)
  top.tick_params(labelbottom=False)
  steps, rate = metrics.series('train/lr')
  top.plot(steps, rate, color=GREEN, linewidth=1.8, **style.dots(rate))
  top.set(title='learning rate', ylim=(0, rate.max() * 1.08 or 1))
  top.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:g}'))
  top.yaxis.set_major_locator(MaxNLocator(4))

  steps, norm = metrics.series('train/grad_norm')
  norm = np.where(np.isfinite(norm) & (norm > 0), norm, np.nan)
  refused = _refused(metrics, steps)
  smoothed, window = smooth(np.where(refused, np.nan, norm))
  bottom.plot(steps, norm, color=BLUE, alpha=0.3, linewidth=0.8, **style.dots(norm))
  bottom.plot(steps, smoothed, color=BLUE, linewidth=1.8, **style.dots(smoothed))
  mean = f', mean of {window} steps' if window > 1 else ''
  bottom.set(xlabel='step', title=f'gradient norm before clipping{mean}')
  style.log_scale(bottom, norm)
  if clip_norm is not None:
    style.rule(bottom, clip_norm, f'clipped above {clip_norm:g}')
  if refused.any():
    for x in steps[refused]:
      bottom.axvline(x, color=ORANGE, alpha=0.35, linewidth=1.0, zorder=1)
    # at the axes' top: a refused step often has no finite norm to stand on
    look = {'color': ORANGE, 'linestyle': 'none', 'marker': 'v', 'markersize': 6}
    x, y = steps[refused], np.full(refused.sum(), 0.96)
    bottom.plot(x, y, transform=bottom.get_xaxis_transform(), label='refused step', **look)
    bottom.legend(loc='lower right', bbox_to_anchor=(1, 0.98), borderaxespad=0)
  tail = smoothed[np.isfinite(smoothed)]
  end = f'ends near {tail[-1]:.2g}' if tail.size else 'is never finite'
  finding = f'Learning rate peaks at {rate.max():.2g}; gradient norm {end}'
  if 'guard/skipped' in metrics:
    finding += f'; {refused.sum()} of {_count(len(refused), "step")} refused'
  return style.title(fig, finding)


@style.styled
def precision_figure(metrics: Metrics) -> Figure | None:
  """What FP8 does to the worst layer: relative error of its operands, and gradient lost."""
  if 'fp8/gradients_error' not in metrics:
    return None
  fig, (error, lost) = style.panels(5.6, rows=2)
  told = {}
  for kind, colour in (('activations', BLUE), ('weights', GREEN), ('gradients', ORANGE)):
    steps, error_NL = metrics.series(f'fp8/{kind}_error')
    told[kind] = error_NL[-1].max()
    error.plot(steps, 100 * error_NL.max(1), color=colour, label=kind, **style.dots(steps))
    _, lost_NL = metrics.series(f'fp8/{kind}_lost')
    lost.plot(steps, 100 * lost_NL.max(1), color=colour, **style.dots(steps))
  error.set(ylabel='error of FP8 operands, %')
  error.legend(loc='upper right')
  lost.set(xlabel='step', ylabel='lost to underflow, %')
  finding = ', '.join(f'{kind} {value:.1%}' for kind, value in told.items())
  return style.title(fig, f'Relative error of FP8 operands in the worst layer: {finding}')


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
  """Centred moving mean over a thirtieth of the points, at most 100, and that number.

  Non-finite points are left out; where a whole window is, the mean is NaN.
  """
  window = min(max(1, len(values) // 30), 100)
  finite, ones = np.isfinite(values), np.ones(window)
  total = np.convolve(np.where(finite, values, 0), ones, 'same')
  number = np.convolve(finite, ones, 'same')
  return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0), window


def _refused(metrics: Metrics, steps: np.ndarray) -> np.ndarray:
  """Booleans [N]: steps that the guard refused. They are part of the run, not of its trend."""
  if 'guard/skipped' not in metrics:
    return np.zeros(len(steps), bool)
  at, skipped = metrics.series('guard/skipped')
  return np.isin(steps, at[skipped > 0])


def _change(first: float, last: float) -> str:
  if f'{first:.2f}' == f'{last:.2f}':
    return f'is {last:.2f}'
  return f'{"falls" if last < first else "rises"} from {first:.2f} to {last:.2f}'


def _count(number: int, noun: str) -> str:
  return f'{number or "no"} {noun}{"" if number == 1 else "s"}'


def _layer_key(fig: Figure, axes: list[Axes], first_layer: int, num_layers: int) -> None:
  """A legend for few layers, a colour bar for many."""
  if num_layers <= 6:
    axes[0].legend(loc='upper right')
    return
  last_layer = first_layer + num_layers - 1
  norm = Normalize(first_layer, first_layer + (num_layers - 1) / style.VIRIDIS_END)
  bar = fig.colorbar(ScalarMappable(norm, 'viridis'), ax=axes, aspect=30, pad=0.02)
  bar.ax.set_ylim(first_layer, last_layer)
  bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
  bar.set_label('layer')


def _columns(steps: np.ndarray, load_NLE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Edges of the heat map's columns, halfway between the steps, and the load in each."""
  parts = np.array_split(np.arange(len(steps)), min(len(steps), MAX_COLUMNS))
  binned = np.stack([load_NLE[part].mean(0) for part in parts])
  if len(parts) == 1:
    return np.array([steps[0] - 0.5, steps[-1] + 0.5]), binned
  ends, starts = steps[[p[-1] for p in parts[:-1]]], steps[[p[0] for p in parts[1:]]]
  inner = (ends + starts) / 2
  # the first and last step lie in the middle of their columns
  return np.array([2 * steps[0] - inner[0], *inner, 2 * steps[-1] - inner[-1]]), binned
