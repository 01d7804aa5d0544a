"""The newest whole checkpoint of a workdir, as a source: one leaf in memory at a time."""

import json
import math
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from moe_jax import config_io
from moe_jax.config import RunConfig
from moe_jax.interop.errors import InteropError
from moe_jax.interop.variables import leaf_shapes
from moe_jax.train import digests
from moe_jax.train.checkpoint import Checkpointer


class Trained:
  """Parameters and selection biases of a run; its optimizer is not read."""

  def __init__(self, workdir: Path | str):
    workdir = Path(workdir)
    path = workdir / 'config.json'
    try:
      cfg: RunConfig = config_io.build(json.loads(path.read_text()))
    except OSError as e:
      raise InteropError(f'{path} cannot be read: {e.strerror}.') from None
    except ValueError as e:
      raise InteropError(f'{path}: {e}') from None
    self.cfg = cfg.model
    self.shapes = leaf_shapes(self.cfg)
    self._state = _newest_whole(workdir / 'checkpoints') / 'state'
    self._last: tuple[str, np.ndarray] | None = None

  def lead(self, leaf: str) -> int:
    return 0

  def dtype(self, leaf: str) -> np.dtype:
    return np.dtype(np.float32)

  def block(self, leaf: str, at: tuple[int, ...]) -> np.ndarray:
    if self._last is None or self._last[0] != leaf:
      self._last = None
      self._last = (leaf, self._read(leaf))
    return self._last[1][at]

  def _read(self, leaf: str) -> np.ndarray:
    if not math.prod(self.shapes[leaf]):
      return np.zeros(self.shapes[leaf], np.float32)
    one = ocp.args.PyTreeRestore(
      item={leaf: np.zeros((), np.float32)},
      restore_args={leaf: ocp.RestoreArgs(restore_type=np.ndarray)},
      partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
      array = orbax.restore(self._state, args=one)[leaf]
    if array.shape != self.shapes[leaf]:
      raise InteropError(
        f'{self._state}: {leaf} should have shape {list(self.shapes[leaf])}, '
        f'and has {list(array.shape)}.'
      )
    return array


def _newest_whole(folder: Path) -> Path:
  with Checkpointer(folder, keep=2) as checkpoints:
    steps = checkpoints.steps()
  problems = []
  for step in reversed(steps):
    path = folder / f'step_{step:08d}'
    try:
      digests.check(path)
      return path.absolute()
    except digests.DamageError as e:
      problems.append(f'step {step}: {e}')
  raise InteropError(f'{folder} has no whole checkpoint{": " if problems else ""}'
                     f'{" | ".join(problems)}.')  # fmt: skip
