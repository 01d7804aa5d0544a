"""The pictures of a scaling law: losses along fixed budgets, and the best size of each budget."""

# R runs

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from moe_jax.analysis import style
from moe_jax.analysis.human import count
from moe_jax.analysis.scaling import Fit, Law, best_size, parabola_minimum
from moe_jax.analysis.style import BLUE, GREY, ORANGE


class Runs(NamedTuple):
  """Runs on a grid of budgets and sizes."""

  budget_R: np.ndarray  # FLOPs that were planned for
  params_R: np.ndarray  # total or active
  tokens_R: np.ndarray
  loss_R: np.ndarray
  flops_R: np.ndarray  # per token

  def tokens(self, budget: float) -> Callable[[np.ndarray], np.ndarray]:
    """What a budget buys at any size; FLOPs a token are interpolated between those of the runs."""
    params, first = np.unique(self.params_R, return_index=True)
    flops = self.flops_R[first]
    return lambda n: budget / np.exp(np.interp(np.log(n), np.log(params), np.log(flops)))


@style.styled
def isoflop_figure(runs: Runs, fit: Fit, *, parameters: str) -> Figure:
  """Left, loss against size for each budget, with the fitted law; right, the best sizes.

  Args:
    parameters: what is counted, for the labels: 'active parameters'.
  """
  fig, (left, right) = style.panels(3.9, columns=2)
  budgets = np.unique(runs.budget_R)
  sizes = np.geomspace(runs.params_R.min(), runs.params_R.max(), 200)
  best = []
  for i, budget in enumerate(budgets):
    here = runs.budget_R == budget
    tokens, colour = runs.tokens(budget), style.depth_colour(i, len(budgets))
    best.append(best_size(fit.law, sizes, tokens))
    left.plot(sizes, fit.law.loss(sizes, tokens(sizes)), color=colour, linewidth=1.6)
    left.plot(runs.params_R[here], runs.loss_R[here], 'o', color=colour, markersize=5)
    lowest = fit.law.loss(np.array(best[-1]), tokens(np.array(best[-1])))
    left.plot(best[-1], lowest, marker='D', color='none', markeredgecolor=colour, markersize=9)
    end = float(fit.law.loss(sizes[-1:], tokens(sizes[-1:]))[0])
    at = {'xytext': (7, 0), 'textcoords': 'offset points', 'va': 'center', 'color': colour}
    left.annotate(f'{budget:.1e}'.replace('+', ''), (float(sizes[-1]), end), **at)
  left.set(xlabel=parameters, ylabel='validation loss, nats per token')
  left.set_title('the law at fixed FLOPs; diamonds: its minimum')
  _log_counts(left)
  left.set_xlim(right=sizes[-1] * (sizes[-1] / sizes[0]) ** 0.22)  # room for the budgets
  _best_sizes(right, runs, fit, budgets, np.array(best), parameters)
  return style.title(fig, _finding(runs, fit, budgets, np.array(best), parameters))


def _best_sizes(
  axes: Axes, runs: Runs, fit: Fit, budgets: np.ndarray, best: np.ndarray, parameters: str
) -> None:
  sizes = np.geomspace(runs.params_R.min(), runs.params_R.max(), 200)
  fine = np.geomspace(budgets[0], budgets[-1], 25)

  def along(law: Law) -> np.ndarray:
    return np.array([best_size(law, sizes, runs.tokens(budget)) for budget in fine])

  every = np.stack([along(law) for law in fit.samples])
  low, high = np.percentile(every, [5, 95], axis=0)
  axes.fill_between(fine, low, high, color=BLUE, alpha=0.15, linewidth=0, label='90% of bootstrap')
  axes.plot(fine, along(fit.law), color=BLUE, linewidth=1.8, label='by the law')
  at, by_parabola = [], []
  for budget in budgets:
    here = runs.budget_R == budget
    minimum = parabola_minimum(runs.params_R[here], runs.loss_R[here])
    if minimum is not None:
      at.append(budget)
      by_parabola.append(minimum)
  axes.plot(at, by_parabola, 's', color=ORANGE, markersize=5, label='by a parabola')
  for edge in (sizes[0], sizes[-1]):
    axes.axhline(edge, color=GREY, linewidth=0.8, linestyle=':')
  axes.set(xlabel='budget, FLOP', ylabel=f'best {parameters}')
  axes.set_title('size of the lowest loss; dotted: the sizes tried')
  _log_counts(axes)
  axes.set_yscale('log')
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y)))
  axes.yaxis.set_minor_formatter(
    FuncFormatter(lambda y, _: _short(y) if f'{y:e}'[0] in '25' else '')
  )
  axes.set_ylim(sizes[0] / 1.25, sizes[-1] * 1.25)
  axes.legend(loc='best')


def _finding(runs: Runs, fit: Fit, budgets: np.ndarray, best: np.ndarray, parameters: str) -> str:
  low, high = fit.interval(lambda law: law.size_exponent)
  exponent = fit.law.size_exponent
  text = (
    f'With {budgets[-1] / budgets[0]:.3g} times the FLOPs the best size goes from '
    f'{count(best[0])} to {count(best[-1])} {parameters}, as C^{exponent:.2f} '
    f'(90%: {low:.2f} to {high:.2f})'
  )
  at_edge = np.isclose(best, runs.params_R.max()) | np.isclose(best, runs.params_R.min())
  if at_edge.any():
    text += f'; {at_edge.sum()} of {len(best)} minima lie at the edge of the sizes tried'
  return text


def _log_counts(axes: Axes) -> None:
  axes.set_xscale('log')
  low, high = axes.get_xlim()
  few = high < 50 * low
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
  minor = FuncFormatter(lambda x, _: _short(x) if few and f'{x:e}'[0] in '25' else '')
  axes.xaxis.set_minor_formatter(minor)


def _short(value: float) -> str:
  """20000 -> '20k'."""
  return count(value).replace('.00', '').replace('.0', '')
