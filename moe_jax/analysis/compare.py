"""Methods side by side: runs of equal seeds share their data order, so differences are paired."""

# N seeds  S steps

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from moe_jax.analysis import style
from moe_jax.analysis.figures import smooth
from moe_jax.analysis.style import BLUE, GREY, ORANGE

# after Okabe and Ito; the baseline is grey
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#8C6D31', '#5E3C99')

ByMethod = Mapping[str, Mapping[int, float]]  # {method: {seed: value}}


class Paired(NamedTuple):
  """A method's difference to the baseline, over the seeds that both have."""

  difference_N: np.ndarray
  mean: float
  half_width: float  # of the 95% interval by Student's t; infinite for one seed

  @property
  def differs(self) -> bool:
    return abs(self.mean) > self.half_width

  def __str__(self) -> str:
    spread = '' if np.isinf(self.half_width) else f' +- {self.half_width:.3f}'
    return f'{self.mean:+.3f}{spread}'


def by_method(
  methods: Iterable[str], seeds: Iterable[int], values: Iterable[float]
) -> dict[str, dict[int, float]]:
  """{method: {seed: value}} from three columns of a table, in the order of the rows."""
  found: dict[str, dict[int, float]] = {}
  for method, seed, value in zip(methods, seeds, values, strict=True):
    found.setdefault(method, {})[int(seed)] = float(value)
  return found


def paired(method: Mapping[int, float], baseline: Mapping[int, float]) -> Paired:
  """Differences of equal seeds, their mean and its 95% interval.

  Raises:
    ValueError: no seed is in both.
  """
  seeds = sorted(method.keys() & baseline.keys())
  if not seeds:
    raise ValueError('the two methods have no seed in common. Run both with the same seeds.')
  difference_N = np.array([method[s] - baseline[s] for s in seeds])
  half_width = np.inf
  if len(seeds) > 1:
    scale = difference_N.std(ddof=1) / np.sqrt(len(seeds))
    half_width = float(stats.t.ppf(0.975, len(seeds) - 1) * scale)
  return Paired(difference_N, float(difference_N.mean()), half_width)


@style.styled
def paired_figure(
  loss: ByMethod, vio: ByMethod, *, baseline: str, measure: str = 'MaxVio'
) -> Figure:
  """Left, loss less the baseline's at the same seed, with intervals; right, the imbalance.

  Args:
    vio: of the end of each run; drawn on a logarithmic axis.
  """
  others = [m for m in loss if m != baseline]
  differences = {m: paired(loss[m], loss[baseline]) for m in others}
  fig, (left, right) = style.panels(1.5 + 0.42 * len(loss), columns=2)
  for y, method in enumerate(others):
    found, colour = differences[method], ORANGE if differences[method].mean > 0 else BLUE
    if not found.differs:
      colour = GREY
    if np.isfinite(found.half_width):
      ends = [found.mean - found.half_width, found.mean + found.half_width]
      left.plot(ends, [y, y], color=colour, linewidth=2.2, alpha=0.7)
    left.plot(found.difference_N, np.full(len(found.difference_N), y), '.', color=colour, alpha=0.5)
    left.plot(found.mean, y, 'o', color=colour, markersize=6)
  left.axvline(0, **style.DASHED)
  left.set(yticks=range(len(others)), yticklabels=others, ylim=(len(others) - 0.5, -0.5))
  left.set(xlabel='nats per token', title=f'validation loss less that of {baseline}: 95% interval')
  every = [*others, baseline]
  for y, method in enumerate(every):
    values = np.array(list(vio[method].values()))
    colour = GREY if method == baseline else BLUE
    right.plot(values, np.full(len(values), y), '.', color=colour, alpha=0.5)
    right.plot(values.mean(), y, 'o', color=colour, markersize=6)
  right.set(yticks=range(len(every)), yticklabels=every, ylim=(len(every) - 0.5, -0.5))
  right.set(xlabel=measure, title='imbalance at the end: dots are seeds')
  _log_x(right, np.concatenate([list(v.values()) for v in vio.values()]))
  left.xaxis.set_major_locator(MaxNLocator(5))
  for axes in (left, right):
    axes.grid(axis='y', visible=False)
    axes.margins(x=0.06)
  return style.title(fig, _finding(differences, vio, baseline, measure))


def _finding(differences: Mapping[str, Paired], vio: ByMethod, baseline: str, measure: str) -> str:
  end = {m: np.mean(list(v.values())) for m, v in vio.items()}
  best = min(differences, key=lambda m: end[m])
  found = differences[best]
  text = f'{best} ends with {measure} {end[best]:.2f} where {baseline} has {end[baseline]:.2f}'
  num = len(found.difference_N)
  if not found.differs:
    text += f'; its loss differs by {found}, within noise ({num} seeds)'
  else:
    text += f', at {"a higher" if found.mean > 0 else "a lower"} loss ({found}, {num} seeds)'
  within = [m for m, d in differences.items() if not d.differs]
  if len(differences) > 1:
    text += f'; {len(within)} of {len(differences)} methods are within noise of {baseline} in loss'
  return text


@style.styled
def curves_figure(
  steps_S: np.ndarray,
  curves: Mapping[str, Mapping[int, np.ndarray]],
  name: str,
  *,
  baseline: str,
) -> Figure:
  """A metric over steps: the mean over seeds of each method, and the range of its seeds.

  The title has means over the last tenth of the steps, and says where the paired difference of the
  lowest to the baseline is noise.
  """
  fig, (axes,) = style.panels(3.6)
  colours = iter(COLOURS)
  ends: dict[str, dict[int, float]] = {}
  window = 1
  for method in sorted(curves, key=lambda m: m != baseline):
    colour = GREY if method == baseline else next(colours)
    smoothed = []
    for values_S in curves[method].values():
      value_S, window = smooth(values_S)
      smoothed.append(value_S)
    smoothed_NS = np.stack(smoothed)
    ends[method] = {seed: v[-max(1, len(v) // 10) :].mean() for seed, v in curves[method].items()}
    look = {'color': colour, 'alpha': 0.18, 'linewidth': 0}
    axes.fill_between(steps_S, smoothed_NS.min(0), smoothed_NS.max(0), **look)
    axes.plot(steps_S, smoothed_NS.mean(0), color=colour, linewidth=1.8, label=method)
  style.log_scale(axes, np.concatenate([v for m in curves.values() for v in m.values()]))
  axes.set_xlabel(f'step (mean of {window} steps; bands: range of the seeds)')
  axes.set_ylabel(name)
  fig.legend(loc='outside right center')
  mean = {method: np.mean(list(values.values())) for method, values in ends.items()}
  lowest = min(mean, key=lambda m: mean[m])
  finding = f'{name[:1].upper()}{name[1:]} ends lowest with {lowest}, {mean[lowest]:.2f}'
  if lowest != baseline:
    finding += f'; {baseline} has {mean[baseline]:.2f}'
    if not paired(ends[lowest], ends[baseline]).differs:
      finding += ', within noise'
  return style.title(fig, finding)


def _log_x(axes, values: np.ndarray) -> None:
  positive = values[values > 0]
  if positive.size and positive.max() > 5 * positive.min():
    axes.set_xscale('log')
    axes.xaxis.set_major_formatter(lambda x, _: f'{x:g}')
    axes.xaxis.set_minor_formatter(lambda x, _: f'{x:g}' if f'{x:e}'[0] in '25' else '')
