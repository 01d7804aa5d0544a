"""Our own converted folder: config.json and our leaves, stacked as the decoder has them.

The leaves lie in safetensors files under our paths ('params.group_0.layer_0.attention.out_HVD'), in
the dtype of the checkpoint they came from. It is what import_hf writes and `RunConfig.init_from`
reads: unlike an Orbax checkpoint it can be written block by block, so that a conversion needs the
memory of a block and not of the model.
"""

import itertools
import json
from pathlib import Path

import numpy as np

from moe_jax import config_io
from moe_jax.config import ModelConfig
from moe_jax.interop.errors import InteropError
from moe_jax.interop.safetensors import Plan, Writer, read_folder
from moe_jax.interop.variables import Source, leaf_shapes, small_lead

_FORMAT = 'moe_jax variables 1'


def is_native(folder: Path) -> bool:
  try:
    return json.loads((folder / 'config.json').read_text()).get('format') == _FORMAT
  except (OSError, ValueError, AttributeError):
    return False


class Native:
  """A folder that `write_native` made, as a source; checked whole when opened."""

  def __init__(self, folder: Path | str):
    self.folder = Path(folder)
    path = self.folder / 'config.json'
    try:
      values = json.loads(path.read_text())['model']
      self.cfg: ModelConfig = config_io.build(values, ModelConfig)
    except (KeyError, ValueError) as e:
      raise InteropError(f'{path}: {e}') from None
    self.shapes = leaf_shapes(self.cfg)
    self._tensors = read_folder(self.folder)
    for name in self.shapes | self._tensors:
      if name not in self._tensors:
        raise InteropError(f'{self.folder}: tensor {name} is missing; its shape should be '
                           f'{list(self.shapes[name])}.')  # fmt: skip
      tensor = self._tensors[name]
      if self.shapes.get(name) != tensor.shape:
        raise InteropError(
          f'{tensor.file}: tensor {name} of shape {list(tensor.shape)} should be '
          f'{list(self.shapes[name]) if name in self.shapes else "absent"}.'
        )

  def lead(self, leaf: str) -> int:
    return small_lead(self.shapes[leaf])

  def dtype(self, leaf: str) -> np.dtype:
    return self._tensors[leaf].dtype

  def block(self, leaf: str, at: tuple[int, ...]) -> np.ndarray:
    return self._tensors[leaf].read(at)


def write_native(source: Source, folder: Path, *, dtype: np.dtype | None = None) -> None:
  """Writes a source into an empty folder, one block in memory at a time.

  Args:
    dtype: of every leaf; None keeps each leaf's own.
  """
  plans = {name: Plan(dtype or source.dtype(name), shape) for name, shape in source.shapes.items()}
  with Writer(folder, plans) as writer:
    for name, shape in source.shapes.items():
      for at in itertools.product(*map(range, shape[: source.lead(name)])):
        writer.write(name, source.block(name, at), at=at)
  config = {'format': _FORMAT, 'model': config_io.to_dict(source.cfg)}
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
