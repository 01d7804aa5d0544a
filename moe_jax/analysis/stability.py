"""How stable a run was: spikes of its loss and its gradient."""

# N steps  W window

import dataclasses
from collections.abc import Callable

import numpy as np

LOSS_SIGMAS = 5.0
GRAD_FACTOR = 10.0
WINDOW = 64  # steps before, that a step is compared with
MIN_STEPS = 16  # fewer steps before say nothing yet


@dataclasses.dataclass(frozen=True)
class Stability:
  """Steps that stood out, and of how many."""

  loss_spikes: int
  grad_spikes: int
  not_finite: int
  steps: int

  @property
  def loss_spikes_per_10k(self) -> float:
    return self.loss_spikes * 1e4 / max(self.steps, 1)

  @property
  def grad_spikes_per_10k(self) -> float:
    return self.grad_spikes * 1e4 / max(self.steps, 1)


def stability(loss_N: np.ndarray, grad_norm_N: np.ndarray) -> Stability:
  """Counts spikes.

  A loss spike lies more than 5 deviations above the mean of the 64 finite, spikeless steps before
  it, where the loss's trend over these is taken out: early on it falls by more than its noise. A
  gradient spike has a norm above 10 times the median of the 64 steps before. A step whose loss or
  norm is not finite counts apart.
  """
  finite_N = np.isfinite(loss_N) & np.isfinite(grad_norm_N)
  loss_spikes = _count(loss_N[finite_N], _loss_spikes)
  grad_spikes = _count(grad_norm_N[finite_N], lambda before, x: x > GRAD_FACTOR * np.median(before))
  return Stability(loss_spikes, grad_spikes, int((~finite_N).sum()), len(loss_N))


def _loss_spikes(before_W: np.ndarray, x: float) -> bool:
  at_W = np.arange(len(before_W))
  slope, start = np.polyfit(at_W, before_W, 1)
  noise = (before_W - start - slope * at_W).std()
  return x > start + slope * len(before_W) + LOSS_SIGMAS * max(noise, 1e-9)


def _count(value_N: np.ndarray, stands_out: Callable[[np.ndarray, float], bool]) -> int:
  """Values that stand out from those before, neighbours once; they do not join these.

  A level that holds for MIN_STEPS steps is no spike but the new course.
  """
  calm: list[float] = []
  away: list[float] = []
  found = 0
  for x in value_N.tolist():
    if len(calm) >= MIN_STEPS and stands_out(np.array(calm[-WINDOW:]), x):
      found += not away
      away.append(x)
      if len(away) >= MIN_STEPS:
        calm, away = away, []
    else:
      calm.append(x)
      away = []
  return found
