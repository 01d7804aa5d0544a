"""Our side: the leaves of a model's variables by path, read and made block by block.

A block is what one index of a leaf's leading dims holds: of a layer, or of one expert of it.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from moe_jax import sharding as sh
from moe_jax.config import ModelConfig
from moe_jax.interop.errors import InteropError
from moe_jax.models.decoder import Decoder
from moe_jax.precision import policy
from moe_jax.train.state import init_variables

Shapes = Mapping[str, tuple[int, ...]]


class Source(Protocol):
  """Something that holds the leaves of a model."""

  @property
  def cfg(self) -> ModelConfig: ...

  @property
  def shapes(self) -> Shapes: ...

  def lead(self, leaf: str) -> int:
    """How many leading dims to index, so that a block is small."""
    ...

  def dtype(self, leaf: str) -> np.dtype: ...

  def block(self, leaf: str, at: tuple[int, ...]) -> np.ndarray: ...


def one_device(platform: str | None = None) -> Mesh:
  """The mesh of one device."""
  device = jax.local_devices(backend=platform)[:1]
  return jax.make_mesh((1, 1, 1), sh.AXES, axis_types=(AxisType.Explicit,) * 3, devices=device)


def target(cfg: ModelConfig) -> Any:
  """Shapes and shardings of a model's float32 variables on the current mesh; no memory is taken."""
  model = Decoder(cfg, policy('float32'))
  return jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))


def flat(tree: Any) -> dict[str, Any]:
  """{'params.group_0.layer_0.attention.out_HVD': leaf, ...}."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@functools.lru_cache
def leaf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of every leaf of a model, by path."""
  with jax.set_mesh(one_device()):
    return {name: leaf.shape for name, leaf in flat(target(cfg)).items()}


def materialize(source: Source) -> Any:
  """The variables of a source, float32, on the current mesh, one leaf after the other.

  Each block is read once; a process holds its own shards of one leaf beside what is already loaded.
  """
  mesh = jax.sharding.get_mesh()
  try:
    tree = target(source.cfg)
  except ValueError as e:
    raise InteropError(
      f'the model does not divide over the mesh {dict(mesh.shape)}: {str(e).splitlines()[0]}'
    ) from e
  leaves = []
  for name, leaf in flat(tree).items():
    sharding = NamedSharding(mesh, leaf.sharding.spec)
    where = sharding.addressable_devices_indices_map(leaf.shape)
    shards = {_ranges(index, leaf.shape) for index in where.values() if index is not None}
    parts = {r: np.empty([stop - start for start, stop in r], leaf.dtype) for r in shards}
    lead = source.lead(name)
    for at in itertools.product(*map(range, leaf.shape[:lead])):
      holders = [r for r in parts if all(a <= i < b for i, (a, b) in zip(at, r, strict=False))]
      if not holders:
        continue
      block = source.block(name, at)
      for r in holders:
        place = tuple(i - a for i, (a, _) in zip(at, r, strict=False))
        parts[r][place] = block[tuple(slice(a, b) for a, b in r[lead:])]
    make = lambda index, p=parts, s=leaf.shape: p[_ranges(index, s)]
    leaves.append(jax.make_array_from_callback(leaf.shape, sharding, make))
    del parts, make
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _ranges(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


class InMemory:
  """Variables that a program holds, as a source."""

  def __init__(self, cfg: ModelConfig, variables: Any):
    self.cfg, self.shapes = cfg, leaf_shapes(cfg)
    self._leaves = flat(
      {name: variables[name] for name in ('params', 'router') if name in variables}
    )
    found = {name: tuple(leaf.shape) for name, leaf in self._leaves.items()}
    for name in self.shapes | found:
      if self.shapes.get(name) != found.get(name):
        raise InteropError(
          f'variables: {name} should be {_shape(self.shapes.get(name))} for this config, '
          f'and is {_shape(found.get(name))}.'
        )
    for name, leaf in self._leaves.items():
      if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise InteropError(
          f'variables: {name} is spread over processes. Save a checkpoint and export its workdir.'
        )

  def lead(self, leaf: str) -> int:
    return small_lead(self.shapes[leaf])

  def dtype(self, leaf: str) -> np.dtype:
    return np.dtype(self._leaves[leaf].dtype)

  def block(self, leaf: str, at: tuple[int, ...]) -> np.ndarray:
    array = self._leaves[leaf]
    if not isinstance(array, jax.Array):
      return np.asarray(array)[at]
    out = np.empty(array.shape[len(at) :], array.dtype)
    for shard in array.addressable_shards:
      ranges = _ranges(shard.index, array.shape)
      if shard.replica_id == 0 and all(a <= i < b for i, (a, b) in zip(at, ranges, strict=False)):
        inner = tuple(slice(a, b) for a, b in ranges[len(at) :])
        local = tuple(i - a for i, (a, _) in zip(at, ranges, strict=False))
        out[inner] = np.asarray(shard.data)[local]
    return out


def small_lead(shape: tuple[int, ...], limit: int = 64 * 2**20) -> int:
  """The fewest leading dims whose blocks have at most `limit` elements."""
  lead = 0
  while lead < len(shape) - 1 and math.prod(shape[lead:]) > limit:
    lead += 1
  return lead


def _shape(shape: tuple[int, ...] | None) -> str:
  return 'absent' if shape is None else str(list(shape))
