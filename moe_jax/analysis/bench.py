"""Pictures of benchmark results."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.analysis.style import BLUE, GREEN, GREY, ORANGE, WIDTH, styled

_COLORS = (BLUE, ORANGE, GREEN, GREY)
_LINES = ('-', '--', ':', '-.')


@styled
def cost_by_length(result: dict) -> Figure:
  """Time and bytes against length, one colour an implementation; `result` as the bench keeps it."""
  rows = [row for row in result['rows'] if row.get('length')]
  by = list(dict.fromkeys(row['by'] for row in rows))
  work = list(dict.fromkeys(row['work'] for row in rows))
  colors, lines = dict(zip(by, _COLORS, strict=False)), dict(zip(work, _LINES, strict=False))
  fig = Figure(figsize=(WIDTH, 3.6), layout='constrained')
  columns = {'ms': 'milliseconds', 'gigabytes': 'GB of device memory, counted'}
  for ax, (column, label) in zip(fig.subplots(1, 2), columns.items(), strict=True):
    for key in dict.fromkeys((row['by'], row['work']) for row in rows):
      points = [(r['length'], r[column]) for r in rows if (r['by'], r['work']) == key]
      x, y = zip(*sorted((n, v) for n, v in points if v is not None), strict=True)
      ax.plot(
        x, y, lines[key[1]], color=colors[key[0]], marker='o', markersize=3, label=' '.join(key)
      )
    _log_axes(ax, sorted({row['length'] for row in rows}), label)
  fig.axes[0].legend(fontsize=8)
  fig.suptitle(f'{result["command"].split("=")[-1]}, one {result["device"]}, {result["date"]}')
  return fig


def _log_axes(ax: Axes, lengths: list[int], label: str) -> None:
  ax.set_xscale('log', base=2)
  ax.set_yscale('log')
  ax.set_xticks(lengths, [f'{n // 1024}k' for n in lengths])
  ax.set_xlabel('tokens')
  ax.set_ylabel(label)
