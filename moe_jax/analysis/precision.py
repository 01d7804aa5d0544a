"""Runs of one model under several precision policies, compared: pure functions of their losses."""

# N steps  W windows

import numpy as np
from matplotlib.figure import Figure

from moe_jax.analysis import style

# a loss above the mean of the steps before by this many of their deviations is a spike
_SPIKE = 6.0


def windows(loss_N: np.ndarray, num: int = 40) -> np.ndarray:
  """Means of `num` equal parts of the run, what is left over at its beginning left out."""
  size = max(len(loss_N) // num, 1)
  return loss_N[len(loss_N) % size :].reshape(-1, size).mean(1)


def spikes(loss_N: np.ndarray, window: int = 64) -> int:
  """Steps whose loss lies far above those before."""
  return sum(
    loss_N[i] > loss_N[i - window : i].mean() + _SPIKE * loss_N[i - window : i].std()
    for i in range(window, len(loss_N))
  )


def summarize(losses: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
  """Of each run: loss over the last quarter, relative to bfloat16's, and its spikes."""
  last = {name: loss_N[-max(len(loss_N) // 4, 1) :].mean() for name, loss_N in losses.items()}
  return {
    name: {
      'loss_last_quarter': float(last[name]),
      'relative_to_bfloat16': float(last[name] / last['bfloat16'] - 1),
      'largest_window': float(
        np.abs(windows(loss_N) / windows(losses['bfloat16']) - 1)[1:].max(initial=0)
      ),
      'spikes': int(spikes(loss_N)),
    }
    for name, loss_N in losses.items()
  }


@style.styled
def draw(losses: dict[str, np.ndarray], summary: dict[str, dict[str, float]]) -> Figure:
  base_W = windows(losses['bfloat16'])
  steps_W = np.arange(1, len(base_W) + 1) * max(len(losses['bfloat16']) // len(base_W), 1)
  fig, (axes,) = style.panels(4.2)
  if 'twin' in losses:
    noise_W = 100 * np.abs(windows(losses['twin']) / base_W - 1)
    band_W = np.maximum.accumulate(noise_W[::-1])[::-1]
    axes.fill_between(
      steps_W, -band_W, band_W, color=style.GREY, alpha=0.25, label='bfloat16, rounded differently'
    )
  colours = [style.BLUE, style.ORANGE, style.GREEN]
  others = [name for name in losses if name not in ('bfloat16', 'twin')]
  for name, colour in zip(others, colours, strict=False):
    off_W = 100 * (windows(losses[name]) / base_W - 1)
    axes.plot(steps_W, off_W, color=colour, label=name, linewidth=1.4)
  style.rule(axes, 0.25, '0.25%')
  axes.set(xlabel='step', ylabel='loss relative to bfloat16, %')
  if len(losses) > 1:
    axes.legend(loc='upper right')
  found = [f'{name} {100 * summary[name]["relative_to_bfloat16"]:+.2f}%' for name in others]
  return style.title(fig, 'Loss over the last quarter against bfloat16: ' + ', '.join(found))
