"""How our parameters and a checkpoint's tensors correspond, as tables that read both ways.

A generation's file lists Rules for a layer; Scopes say which layers they hold for; `links` makes
of both one Link for every block that is copied. Layers that the decoder scans are stacked in our
leaves, so a leaf's first index is the repeat of its group's pattern.

A Rule is one line of a table:

  Rule('attention.key_up_RHN', 'self_attn.kv_b_proj.weight', '(h x) r -> r h x', ('x', 0, N + V))

reads: view the tensor as [h, x, r], take the part of axis x that starts at 0 of its N + V entries
and is as long as ours, and put the axes in the order [r, h, x]. Where axis x is not in ours, the
entry at the given place is taken. Exactly invertible: nothing is computed, only moved.

In a leaf's name, `[e, :, 0]` picks what the tensor holds, e being the expert. In a tensor's name
`{e}` is the expert's number, and `[e]` at the end says that experts are stacked in one tensor.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.models.grouping import group_layers

Index = tuple[Any, ...]


class Rule(NamedTuple):
  leaf: str
  tensor: str  # '' where the checkpoint has no such thing: ours is zero
  pattern: str = ''
  part: tuple[str, int, int] | None = None  # axis, first entry, entries of the tensor in all
  collection: str = 'params'


class Scope(NamedTuple):
  """Rules with what stands before their names, and the leading index of every leaf."""

  ours: str
  at: tuple[int, ...]
  theirs: str
  rules: Sequence[Rule]


class Link(NamedTuple):
  """One block of a leaf and the block of a tensor that fills it, or part of it."""

  leaf: str
  leaf_at: tuple[int, ...]  # leading index of the block
  leaf_part: Index  # what of the block
  tensor: str
  tensor_at: tuple[int, ...]
  tensor_lead: tuple[int, ...]  # sizes of the tensor's dims that tensor_at indexes
  pattern: str
  part: tuple[str, int, int] | None


def layers(cfg: ModelConfig) -> Iterator[tuple[int, str, int]]:
  """Layer number, path of its parameters ('group_1.layer_0.'), and its place in their stack."""
  number = 0
  for g, (pattern, repeats) in enumerate(group_layers(cfg.layers)):
    for repeat in range(repeats):
      for i in range(len(pattern)):
        yield number, f'group_{g}.layer_{i}.', repeat
        number += 1


def links(scopes: Sequence[Scope], shapes: Mapping[str, tuple[int, ...]]) -> list[Link]:
  """Every block to be copied, in the order of the scopes.

  Args:
    shapes: of our leaves by path, 'params.group_0...' and 'router.group_0...'.
  """
  found = []
  for ours, at, theirs, rules in scopes:
    for rule in rules:
      name, index = _split_index(rule.leaf)
      leaf = f'{rule.collection}.{ours}{name}'
      shape = shapes[leaf]
      if 'e' not in index:
        tensor = f'{theirs}{rule.tensor}' if rule.tensor else ''
        found.append(Link(leaf, at, index, tensor, (), (), rule.pattern, rule.part))
        continue
      assert index[0] == 'e', rule
      num_experts = shape[len(at)]
      stacked = rule.tensor.endswith('[e]')
      for e in range(num_experts):
        tensor = theirs + rule.tensor.removesuffix('[e]').replace('{e}', str(e))
        place = ((e,), (num_experts,)) if stacked else ((), ())
        found.append(Link(leaf, (*at, e), index[1:], tensor, *place, rule.pattern, rule.part))
  return found


def _split_index(leaf: str) -> tuple[str, Index]:
  name, _, inside = leaf.removesuffix(']').partition('[')
  words = [word.strip() for word in inside.split(',')] if inside else []
  return name, tuple(
    slice(None) if word == ':' else 'e' if word == 'e' else int(word) for word in words
  )


def tensor_shape(link: Link, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
  """The shape that the whole tensor must have."""
  return (*link.tensor_lead, *_View(link, shapes).tensor)


def to_leaf(link: Link, shapes: Mapping[str, tuple[int, ...]], block: np.ndarray) -> np.ndarray:
  """A tensor's block, as the part of our block that it fills; a view."""
  view = _View(link, shapes)
  return block.reshape(view.split)[view.taken].transpose(view.order)


def from_leaf(
  link: Link, shapes: Mapping[str, tuple[int, ...]], block: np.ndarray, out: np.ndarray
) -> None:
  """Inverse: writes what our block has of the tensor's block into `out`."""
  view = _View(link, shapes)
  out.reshape(view.split)[view.taken] = block[link.leaf_part].transpose(np.argsort(view.order))


class _View:
  """A link's pattern with its sizes: how the tensor's block is seen."""

  def __init__(self, link: Link, shapes: Mapping[str, tuple[int, ...]]):
    left, right = (side.strip() for side in link.pattern.split('->'))
    axes = right.split()
    shape = _index_shape(shapes[link.leaf][len(link.leaf_at) :], link.leaf_part)
    assert len(axes) == len(shape), (link, shape)
    sizes = dict(zip(axes, shape, strict=True))
    ours = dict(sizes)
    if link.part:
      sizes[link.part[0]] = link.part[2]
    groups = [re.findall(r'\w+', g) for g in re.findall(r'\([^)]*\)|\w+', left)]
    names = [name for group in groups for name in group]
    self.tensor = tuple(math.prod(sizes[n] for n in group) for group in groups)
    self.split = tuple(sizes[n] for n in names)
    self.taken = tuple(_taken(n, link.part, ours) for n in names)
    kept = [n for n in names if n in ours]
    self.order = tuple(kept.index(n) for n in axes)


def _taken(axis: str, part: tuple[str, int, int] | None, ours: Mapping[str, int]) -> slice | int:
  if part is None or part[0] != axis:
    return slice(None)
  return slice(part[1], part[1] + ours[axis]) if axis in ours else part[1]


def _index_shape(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
  rest = tuple(size for size, i in zip(shape, index, strict=False) if isinstance(i, slice))
  return rest + shape[len(index) :]
