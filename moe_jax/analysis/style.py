"""How every picture here looks: one dictionary of settings, and the few helpers that apply it."""

import functools
import io
import textwrap
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

# Okabe and Ito's palette, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#6B6B6B'
DASHED = {'color': GREY, 'linestyle': (0, (4, 3)), 'linewidth': 1.2}
WIDTH = 8.0  # inches; with 150 dots each, text is readable at a README's width
STYLE: dict[Any, Any] = {
  'figure.dpi': 150,
  'figure.facecolor': 'white',
  'font.size': 10,
  'axes.titlesize': 10,
  'axes.titlelocation': 'left',
  'axes.titlecolor': GREY,
  'axes.labelcolor': GREY,
  'axes.edgecolor': '#B0B0B0',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'axes.xmargin': 0.015,
  'grid.color': '#E8E8E8',
  'grid.linewidth': 0.8,
  'xtick.color': '#B0B0B0',
  'ytick.color': '#B0B0B0',
  'xtick.labelcolor': GREY,
  'ytick.labelcolor': GREY,
  'legend.frameon': False,
  'lines.solid_capstyle': 'round',
  'agg.path.chunksize': 10_000,
}
VIRIDIS_END = 0.88  # the yellow beyond is too pale for a line on white


def styled[**P, R](draw: Callable[P, R]) -> Callable[P, R]:
  """Runs a drawing function with this style and leaves matplotlib's own settings alone."""

  @functools.wraps(draw)
  def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
    with matplotlib.rc_context(STYLE):
      return draw(*args, **kwargs)

  return wrapped


def panels(
  height: float, *, rows: int = 1, columns: int = 1, share: bool = False
) -> tuple[Figure, list[Axes]]:
  """Makes a figure with a grid of axes over steps. No pyplot: nothing global remembers it."""
  fig = Figure(figsize=(WIDTH, height), layout='constrained')
  grid = fig.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
  for axes in grid.flat:
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
  return fig, list(grid.flat)


def title(fig: Figure, finding: str) -> Figure:
  # a value and its interval stay on one line
  text = textwrap.fill(finding.replace(' +- ', '+-'), 82).replace('+-', ' +- ')
  fig.suptitle(text, x=0.012, ha='left', fontsize=11.5, fontweight='bold', color='#222222')
  return fig


@styled
def png(fig: Figure) -> bytes:
  """The figure as it is kept in a notebook: 256 colours, a third of the bytes."""
  with io.BytesIO() as drawn, io.BytesIO() as small:
    fig.savefig(drawn, format='png')
    with Image.open(drawn) as image:
      image.convert('RGB').quantize(256).save(small, format='PNG', optimize=True)
    return small.getvalue()


def rule(axes: Axes, y: float, label: str) -> None:
  """A dashed horizontal line with its name at the right end."""
  axes.axhline(y, **DASHED)
  axes.annotate(
    label,
    (1, y),
    xycoords=('axes fraction', 'data'),
    xytext=(-4, 3),
    textcoords='offset points',
    ha='right',
    color=GREY,
  )


def log_scale(axes: Axes, values: np.ndarray) -> None:
  """A logarithmic y axis with plain numbers; linear where the values are too close for one."""
  positive = values[values > 0]
  if not positive.size or positive.max() < 5 * positive.min():
    return
  axes.set_yscale('log')
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:g}'))
  few_decades = positive.max() < 500 * positive.min()
  minor = FuncFormatter(lambda y, _: f'{y:g}' if few_decades and f'{y:e}'[0] in '25' else '')
  axes.yaxis.set_minor_formatter(minor)


def dots(values: np.ndarray) -> dict[str, Any]:
  """A line of one point is invisible without a marker."""
  return {'marker': 'o', 'markersize': 4} if len(values) == 1 else {}


def depth_colour(layer: int, num_layers: int) -> Any:
  """Dark for the first layer, light green for the last."""
  return matplotlib.colormaps['viridis'](VIRIDIS_END * layer / max(1, num_layers - 1))
