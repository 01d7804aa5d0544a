"""The generations that can be read and written, one file each."""

from collections.abc import Sequence
from typing import Any, Protocol

from moe_jax.config import ModelConfig
from moe_jax.interop import moe_16b, v2, v3, v4, v32
from moe_jax.interop.errors import InteropError
from moe_jax.interop.fields import Fields
from moe_jax.interop.table import Scope


class Family(Protocol):
  """What the file of a generation defines; to add one, write it and name it in FAMILIES."""

  MODEL_TYPE: str
  # ways of naming tensors, the first for export; export_hf --packed takes the one named 'packed'
  STYLES: tuple[str, ...]

  def read_config(self, f: Fields, /) -> ModelConfig: ...

  def write_config(self, cfg: ModelConfig, /) -> dict[str, Any]: ...

  def objection(self, cfg: ModelConfig, /) -> str:
    """Why a model cannot be written as this generation, or ''."""
    ...

  def scopes(self, cfg: ModelConfig, style: str, /) -> Sequence[Scope]: ...

  def copies(self, cfg: ModelConfig, style: str, /) -> Sequence[Scope]:
    """Tensors that repeat others: written on export, not asked for on import."""
    ...

  def is_ahead(self, cfg: ModelConfig, name: str, /) -> bool:
    """Whether a tensor is multi-token prediction's."""
    ...

  def left_out(self, cfg: ModelConfig, name: str, /) -> str:
    """What a tensor is that import leaves out, in a word or two, or ''."""
    ...


FAMILIES: dict[str, Any] = {family.MODEL_TYPE: family for family in (moe_16b, v2, v3, v4, v32)}


def by_type(f: Fields) -> Family:
  name = f.get('model_type', str)
  if name not in FAMILIES:
    raise f.fail('model_type', f'is not supported: it should be one of {", ".join(FAMILIES)}.')
  return FAMILIES[name]


def for_model(cfg: ModelConfig) -> Family:
  """The generation that a model is; raises InteropError with what keeps it from being each."""
  objections = {name: family.objection(cfg) for name, family in FAMILIES.items()}
  fits = [name for name, objection in objections.items() if not objection]
  if not fits:
    reasons = '; '.join(f'{name}: {objection}' for name, objection in objections.items())
    raise InteropError(f'this model is none of the published ones ({reasons}).')
  return FAMILIES[fits[0]]
