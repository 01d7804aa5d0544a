"""What an evaluation learns of the routing: metrics, and a file of counts for later study."""

# L layers with experts  G domains  E experts  T tokens  K experts a token

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

FOLDER = 'routing'


@dataclasses.dataclass(frozen=True)
class Routing:
  """Counts over the whole evaluation; host arrays.

  load_LGE: tokens of each domain that chose each expert. pairs_LEE: tokens that chose both; the
  diagonal is the load. chosen_LTK: choices of the first tokens, always the same ones.
  """

  load_LGE: np.ndarray
  pairs_LEE: np.ndarray
  chosen_LTK: np.ndarray

  @classmethod
  def of(cls, evaluated: Sequence[Any]) -> 'Routing | None':
    """Adds up the batches of an evaluation, see `step.Evaluated`; None without experts."""
    batches = [jax.tree.map(np.asarray, e.routing) for e in evaluated]
    if not batches[0]:
      return None
    load_LGE, pairs_LEE = (
      np.sum([b[name] for b in batches], axis=0) for name in ('load_LGE', 'pairs_LEE')
    )
    return cls(load_LGE, pairs_LEE, batches[0]['chosen_LTK'].astype(np.uint16))

  def metrics(self, before: 'Routing | None') -> dict[str, list[float]]:
    """By layer. The names' meaning:

    max_vio_global: MaxVio over the whole evaluation (arXiv:2408.15664: of the validation set).
    dead_global: experts that no token of the evaluation chose.
    domain_information: mutual information of a choice's domain and its expert, bits; 0 where
      domains use experts alike, at most the entropy of the domains.
    coactivation: P(j chosen | i chosen) of the best partner j, mean over experts i; by chance
      (K - 1) / (E - 1).
    overlap: share of choices equal to those `before`, on the same tokens (router saturation,
      arXiv:2409.02060, section 4.1, between neighbouring evaluations).
    """
    load_LE = self.load_LGE.sum(1)
    mean_L = np.maximum(load_LE.mean(-1), 1e-9)
    values = {
      'max_vio_global': load_LE.max(-1) / mean_L - 1,
      'dead_global': (load_LE == 0).sum(-1),
      'domain_information': mutual_information(self.load_LGE),
      'coactivation': coactivation(self.pairs_LEE),
    }
    if before is not None and before.chosen_LTK.shape == self.chosen_LTK.shape:
      values['overlap'] = overlap(self.chosen_LTK, before.chosen_LTK)
    return {f'router/{name}': value_L.tolist() for name, value_L in values.items()}

  def save(self, workdir: Path, step: int) -> None:
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    part = folder / f'.step_{step:08}.npz'
    with part.open('wb') as file:
      np.savez_compressed(file, **dataclasses.asdict(self))
    part.rename(folder / f'step_{step:08}.npz')

  @classmethod
  def load(cls, workdir: Path, step: int) -> 'Routing':
    with np.load(workdir / FOLDER / f'step_{step:08}.npz') as file:
      return cls(**file)


def saved_steps(workdir: Path) -> list[int]:
  """The steps whose evaluation is on record, in order."""
  return sorted(int(p.stem.removeprefix('step_')) for p in (workdir / FOLDER).glob('step_*.npz'))


def mutual_information(load_LGE: np.ndarray) -> np.ndarray:
  """Bits that a choice's expert tells of its domain, [L]; biased upwards by about GE / 2N of N."""
  p_LGE = load_LGE / np.maximum(load_LGE.sum((1, 2), keepdims=True), 1)
  independent_LGE = p_LGE.sum(1, keepdims=True) * p_LGE.sum(2, keepdims=True)
  ratio_LGE = np.divide(p_LGE, independent_LGE, out=np.ones_like(p_LGE), where=p_LGE > 0)
  return (p_LGE * np.log(ratio_LGE)).sum((1, 2)) / math.log(2)


def coactivation(pairs_LEE: np.ndarray) -> np.ndarray:
  """Mean over the experts i in use of max_j P(j chosen | i chosen), [L]."""
  load_LE = np.diagonal(pairs_LEE, axis1=1, axis2=2)
  others_LEE = pairs_LEE * (1 - np.eye(pairs_LEE.shape[-1]))
  best_LE = others_LEE.max(-1) / np.maximum(load_LE, 1)
  return best_LE.sum(-1) / np.maximum((load_LE > 0).sum(-1), 1)


def overlap(chosen_LTK: np.ndarray, other_LTK: np.ndarray) -> np.ndarray:
  """Share of a token's choices that are among its `other` ones, mean over tokens, [L].

  A choice that goes nowhere (the largest number) matches one that does; few methods have any.
  """
  same_LTKK = chosen_LTK[..., :, None] == other_LTK[..., None, :]
  return same_LTKK.any(-1).mean((1, 2))
