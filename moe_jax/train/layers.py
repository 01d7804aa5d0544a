"""One kind of leaf of every layer with experts, as one array, and back into the model's tree.

A tree is {group: {layer of its pattern: {'moe': {name: value}}}} with a leading dim of repeats in
each value; the modules of multi-token prediction have one layer, `block`, without that dim. L
counts the layers that have the name, in the order of the model: groups, their repeats, the layers
of a pattern, then the modules.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# L layers  R repeats


def _groups(tree: Any, *names: str) -> list[tuple[str, list[str], bool]]:
  """[(group, its layers that have one of `names`, whether these are repeated)], in order."""
  by_number = lambda key: int(key.rsplit('_', 1)[1])
  found = []
  for prefix, repeated in (('group_', True), ('mtp_', False)):
    for group in sorted((key for key in tree if key.startswith(prefix)), key=by_number):
      layers = sorted((k for k in tree[group] if k.startswith('layer_')), key=by_number)
      layers = layers if repeated else ['block'] if 'block' in tree[group] else []
      layers = [key for key in layers if any(n in tree[group][key].get('moe', {}) for n in names)]
      if layers:
        found.append((group, layers, repeated))
  return found


def which_have(tree: Any, name: str, other: str) -> list[bool]:
  """Of the layers with `name` or `other`, in the order of the model, which have `name`."""
  found = []
  for group, layers, repeated in _groups(tree, name, other):
    values = [tree[group][key]['moe'] for key in layers]
    repeats = jax.tree.leaves(values[0])[0].shape[0] if repeated else 1
    found += [name in value for value in values] * repeats
  return found


def stack(tree: Any, name: str) -> Any:
  """The value `name` of every layer that has it: its leaves [L, ...]; None where no layer has."""
  parts = []
  for group, layers, repeated in _groups(tree, name):
    values = [tree[group][key]['moe'][name] for key in layers]
    if not repeated:
      values = jax.tree.map(lambda a: a[None], values)
    parts.append(jax.tree.map(_interleave, *values))
  return jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if parts else None


def _interleave(*of_layers: jax.Array) -> jax.Array:
  """Layers of a pattern, [R, ...] each -> [R * layers, ...], repeats outermost."""
  together = jnp.stack(of_layers, axis=1)
  return together.reshape(-1, *together.shape[2:])


def unstack(tree: Any, name: str, stacked: Any, *, to: str = '') -> Any:
  """Inverse of `stack`: {group: {layer: {'moe': {name: value}}}} for the layers that have it.

  Args:
    to: the name that the values get instead.
  """
  new: dict[str, Any] = {}
  at = 0
  for group, layers, repeated in _groups(tree, name):
    like = jax.tree.leaves(tree[group][layers[0]]['moe'][name])[0]
    num = (like.shape[0] if repeated else 1) * len(layers)
    rows = jax.tree.map(functools.partial(_rows, at=at, num=num, layers=len(layers)), stacked)
    at += num
    for i, key in enumerate(layers):
      value = jax.tree.map(lambda a: a[:, i] if repeated else a[0, i], rows)  # noqa: B023
      new.setdefault(group, {})[key] = {'moe': {to or name: value}}
  return new


def _rows(stacked: jax.Array, *, at: int, num: int, layers: int) -> jax.Array:
  return stacked[at : at + num].reshape(-1, layers, *stacked.shape[1:])


def merge(tree: Any, other: Any) -> Any:
  """`tree` with the values of `other` put over its own."""
  if not isinstance(tree, dict) or not isinstance(other, dict):
    return other
  return tree | {k: merge(tree[k], v) if k in tree else v for k, v in other.items()}
