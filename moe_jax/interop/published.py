"""Writing a model in the published layout, tensor by tensor."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.interop import families
from moe_jax.interop.errors import InteropError
from moe_jax.interop.safetensors import Plan, Writer
from moe_jax.interop.table import Link, from_leaf, links, tensor_shape
from moe_jax.interop.variables import Source

# what a checkpoint's own config.json says beyond the model, and is handed on
_HANDED_ON = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'max_position_embeddings')


class Export:
  """A model about to be written; making one checks everything and writes nothing.

  Args:
    packed: experts of a layer in one tensor, as transformers holds them, not one tensor each.
    dtype: of every weight; None keeps each one's own. Selection biases keep theirs always.
    origin: the config.json that the model was imported from, for what the model does not know.

  Raises:
    InteropError: no published generation is this model.
  """

  def __init__(
    self,
    source: Source,
    *,
    packed: bool = False,
    dtype: np.dtype | None = None,
    origin: dict[str, Any] | None = None,
  ):
    family = families.for_model(source.cfg)
    style = 'packed' if packed else family.STYLES[0]
    if style not in family.STYLES:
      raise InteropError(f'{family.MODEL_TYPE} has no packed layout. Export without --packed.')
    self._source = source
    scopes = [*family.scopes(source.cfg, style), *family.copies(source.cfg, style)]
    found = links(scopes, source.shapes)
    self._refuse_what_is_lost(found, family.MODEL_TYPE)
    self._tensors: dict[str, dict[tuple[int, ...], list[Link]]] = {}
    for link in found:
      if link.tensor:
        self._tensors.setdefault(link.tensor, {}).setdefault(link.tensor_at, []).append(link)
    self._plans = {name: self._plan(blocks, dtype) for name, blocks in self._tensors.items()}
    self.config = {'model_type': family.MODEL_TYPE, **family.write_config(source.cfg)}
    self.config |= {name: origin[name] for name in _HANDED_ON if origin and name in origin}
    weights = {str(plan.dtype) for plan in self._plans.values() if len(plan.shape) > 1}
    self.config['torch_dtype'] = weights.pop() if len(weights) == 1 else 'float32'

  def write(self, folder: Path) -> None:
    """Writes config.json and the tensors into an empty folder, one block in memory at a time."""
    with Writer(folder, self._plans) as writer:
      for name, blocks in self._tensors.items():
        plan = self._plans[name]
        for at, parts in blocks.items():
          # never float32 in between: what is copied is copied bit for bit
          out = np.empty(plan.shape[len(at) :], plan.dtype)
          for link in parts:
            from_leaf(link, self._source.shapes, self._block(link), out)
          writer.write(name, out, at=at)
    (folder / 'config.json').write_text(json.dumps(self.config, indent=2) + '\n')

  _last: tuple[tuple[str, tuple[int, ...]], np.ndarray] | None = None

  def _block(self, link: Link) -> np.ndarray:
    """Gate and up of an expert lie in one block, and are asked for one after the other."""
    key = (link.leaf, link.leaf_at)
    if self._last is None or self._last[0] != key:
      self._last = (key, self._source.block(*key))
    return self._last[1]

  def _plan(self, blocks: dict[tuple[int, ...], list[Link]], dtype: np.dtype | None) -> Plan:
    link = next(iter(blocks.values()))[0]
    own = self._source.dtype(link.leaf)
    if dtype is None or link.leaf.startswith('router.'):
      dtype = own
    return Plan(dtype, tensor_shape(link, self._source.shapes))

  def _refuse_what_is_lost(self, found: list[Link], model_type: str) -> None:
    for link in found:
      if not link.tensor and np.any(self._source.block(link.leaf, link.leaf_at)):
        raise InteropError(
          f'{link.leaf} is not zero, and {model_type} has no place for a selection bias: the '
          'exported model would route otherwise. Train it without loss_free balancing.'
        )
