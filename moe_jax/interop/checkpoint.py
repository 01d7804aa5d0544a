"""A Hugging Face checkpoint as a source of our leaves: checked whole, then read block by block."""

from collections import Counter
from pathlib import Path

import numpy as np

from moe_jax.interop import ahead, families, quantized
from moe_jax.interop.errors import InteropError
from moe_jax.interop.fields import Fields
from moe_jax.interop.safetensors import Tensor, read_folder
from moe_jax.interop.table import Link, links, tensor_shape, to_leaf
from moe_jax.interop.variables import leaf_shapes


class Checkpoint:
  """A folder with config.json and .safetensors files, as published or by `save_pretrained`.

  Opening it reads the headers alone, and raises InteropError for the first tensor that is missing,
  extra, of another shape or cut off, and for a config that this project does not support.
  """

  def __init__(self, folder: Path | str):
    self.folder = Path(folder)
    if not self.folder.is_dir():
      raise InteropError(f'{self.folder} is not a folder.')
    f = Fields(self.folder / 'config.json')
    family = families.by_type(f)
    try:
      self.cfg = family.read_config(f)
    except InteropError:
      raise
    except ValueError as e:
      raise InteropError(f'{f.path}: {e}') from None
    f.finish()
    self._fp8_block = f.fp8_block()
    self._tensors = read_folder(self.folder)
    self.cfg = ahead.as_present(self.cfg, family, self._tensors)
    self.shapes = leaf_shapes(self.cfg)
    notes = {name: family.left_out(self.cfg, name) for name in self._tensors}
    self.left_out = Counter(note for note in notes.values() if note)
    self._tensors = {name: t for name, t in self._tensors.items() if not notes[name]}
    self._scales = {
      name: quantized.scale_of(name, self._tensors)
      for name, tensor in self._tensors.items()
      if tensor.dtype in quantized.FP8
    }
    found = [links(family.scopes(self.cfg, style), self.shapes) for style in family.STYLES]
    self._links = min(found, key=self._misfits)
    self._check()
    self._blocks: dict[str, dict[tuple[int, ...], list[Link]]] = {}
    for link in self._links:
      self._blocks.setdefault(link.leaf, {}).setdefault(link.leaf_at, []).append(link)

  def lead(self, leaf: str) -> int:
    return len(next(iter(self._blocks[leaf])))

  def dtype(self, leaf: str) -> np.dtype:
    """The widest of its tensors' dtypes; what was FP8 becomes float32."""
    found = {
      self._tensors[link.tensor].dtype
      for block in self._blocks[leaf].values()
      for link in block
      if link.tensor
    }
    if len(found) == 1 and not found & set(quantized.FP8):
      return found.pop()
    return np.dtype(np.float32)

  def block(self, leaf: str, at: tuple[int, ...]) -> np.ndarray:
    """The block in its checkpoint's dtype, FP8 dequantised to float32."""
    shape = self.shapes[leaf][len(at) :]
    out = None
    for link in self._blocks[leaf][at]:
      if not link.tensor:
        return np.zeros(shape, np.float32)
      piece = to_leaf(link, self.shapes, self._read(link))
      if out is None:
        out = np.empty(shape, piece.dtype)
      out[link.leaf_part] = piece
    assert out is not None
    return out

  def _read(self, link: Link) -> np.ndarray:
    block = self._tensors[link.tensor].read(link.tensor_at)
    if link.tensor not in self._scales:
      return block
    scale = self._tensors[self._scales[link.tensor]].read(link.tensor_at)
    return quantized.dequantize(block, scale, self._fp8_block)

  def _expected(self, found: list[Link]) -> set[str]:
    return {link.tensor for link in found if link.tensor} | set(self._scales.values())

  def _misfits(self, found: list[Link]) -> int:
    return len(self._expected(found) ^ set(self._tensors))

  def _check(self) -> None:
    expected = self._expected(self._links)
    for link in self._links:
      if link.tensor:
        self._check_tensor(link.tensor, tensor_shape(link, self.shapes))
    for name, scale in self._scales.items():
      tensor = self._tensors[name]
      if len(tensor.shape) < 2:
        raise InteropError(
          f'{tensor.file}: tensor {name} of shape {list(tensor.shape)} should not be FP8.'
        )
      self._check_tensor(
        scale, quantized.scale_shape(tensor.shape, self._fp8_block), quantized.SCALES
      )
    for name, tensor in self._tensors.items():
      if name not in expected:
        raise InteropError(
          f'{tensor.file}: extra tensor {name} of shape {list(tensor.shape)}; '
          f'{self.folder / "config.json"} describes a model without it.'
        )

  def _check_tensor(
    self, name: str, shape: tuple[int, ...], dtypes: tuple[np.dtype, ...] | None = None
  ) -> None:
    tensor: Tensor | None = self._tensors.get(name)
    if tensor is None:
      raise InteropError(
        f'{self.folder}: tensor {name} is missing; it should have shape {list(shape)}.'
      )
    if tensor.shape != shape:
      raise InteropError(
        f'{tensor.file}: tensor {name} has shape {list(tensor.shape)}; '
        f'by config.json it should have {list(shape)}.'
      )
    kinds = dtypes or ('float', 'int')
    if dtypes and tensor.dtype not in dtypes:
      raise InteropError(
        f'{tensor.file}: tensor {name} has dtype {tensor.dtype}; '
        f'it should be one of {", ".join(map(str, kinds))}.'
      )
