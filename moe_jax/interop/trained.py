"""The newest whole checkpoint of a workdir, as a source: one leaf in memory at a time."""

import json
from pathlib import Path

import numpy as np

from moe_jax import config_io
from moe_jax.config import RunConfig
from moe_jax.interop.errors import InteropError
from moe_jax.interop.variables import leaf_shapes
from moe_jax.train.checkpoint import Checkpointer, CheckpointError


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
    self._folder = workdir / 'checkpoints'
    with Checkpointer(self._folder, keep=2) as checkpoints:
      try:
        step = checkpoints.newest()
      except CheckpointError as e:
        raise InteropError(str(e)) from None
    if step is None:
      raise InteropError(f'{self._folder} has no checkpoint.')
    self.step = step
    self._last: tuple[str, np.ndarray] | None = None

  def lead(self, leaf: str) -> int:
    return 0

  def dtype(self, leaf: str) -> np.dtype:
    return np.dtype(np.float32)

  def block(self, leaf: str, at: tuple[int, ...]) -> np.ndarray:
    if self._last is None or self._last[0] != leaf:
      self._last = None  # before the next is read, so that memory never holds two
      self._last = (leaf, self._read(leaf))
    return self._last[1][at]

  def _read(self, leaf: str) -> np.ndarray:
    with Checkpointer(self._folder, keep=2) as checkpoints:
      array = checkpoints.read_leaf(self.step, leaf)
    if array.shape != self.shapes[leaf]:
      raise InteropError(
        f'{self._folder}: {leaf} should have shape {list(self.shapes[leaf])}, '
        f'and has {list(array.shape)}.'
      )
    return array
