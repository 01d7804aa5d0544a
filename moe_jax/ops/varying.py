"""What shard_map wants to know of values inside it: over which mesh axes they vary."""

from typing import Any

import jax


def match_vma(*trees: Any) -> tuple[Any, ...]:
  """Marks arrays, and those of trees, as varying over every mesh axis that any of them varies over.

  Inside shard_map a custom derivative must return gradients that vary like its inputs. Marking
  the inputs first makes that true, and the transpose of the mark is the sum over devices that a
  replicated weight's gradient needs.
  """
  arrays, structure = jax.tree.flatten(trees)
  varying = [jax.typeof(a).mat.varying for a in arrays]
  axes = frozenset().union(*varying)
  marked = [
    jax.lax.pcast(a, tuple(axes - have), to='varying')
    for a, have in zip(arrays, varying, strict=True)
  ]
  return jax.tree.unflatten(structure, marked)
