"""Finds the repeats in a list of layers, so that each repeat is compiled once and scanned."""

from collections.abc import Sequence
from typing import NamedTuple

_LONGEST_PATTERN = 4


class Group(NamedTuple):
  """`pattern` of layers, `repeats` times."""

  pattern: tuple
  repeats: int


def group_layers[T](layers: Sequence[T]) -> list[Group]:
  """Covers `layers` in order by groups, each the shortest pattern that covers the most from there.

  [a, b, b, b] -> (a) x1, (b) x3;  [a, a, b, c, b, c, b] -> (a) x2, (b, c) x2, (b) x1.
  """
  groups, i = [], 0
  while i < len(layers):
    best = Group((layers[i],), 1)
    for width in range(1, _LONGEST_PATTERN + 1):
      pattern = tuple(layers[i : i + width])
      repeats = 1
      while tuple(layers[i + repeats * width : i + (repeats + 1) * width]) == pattern:
        repeats += 1
      if repeats > 1 and repeats * width > len(best.pattern) * best.repeats:
        best = Group(pattern, repeats)
    groups.append(best)
    i += len(best.pattern) * best.repeats
  return groups
