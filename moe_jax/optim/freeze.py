"""Training a part of the parameters while the rest stays as it is."""

import re
from typing import Any

import jax
import optax


def trains(pattern: str, tree: Any) -> Any:
  """True for each leaf that `pattern` is found in the path of; the empty one is found in all.

  A path reads like `group_0/layer_1/attention/indexer/key_DI`.
  """

  def found(path: Any, _: Any) -> bool:
    return re.search(pattern, '/'.join(key.key for key in path)) is not None

  return jax.tree_util.tree_map_with_path(found, tree)


def only(tx: optax.GradientTransformation, pattern: str) -> optax.GradientTransformation:
  """`tx` for the parameters that train; the others get no update, no decay and no moments.

  Raises:
    ValueError: by `init`, where `pattern` is found in no path.
  """

  def labels(params: Any) -> Any:
    trained = trains(pattern, params)
    if not any(jax.tree.leaves(trained)):
      raise ValueError(
        f'optim.trainable={pattern!r} is found in the path of no parameter. '
        "Paths read like 'group_0/layer_0/attention/q_up_QHX'."
      )
    return jax.tree.map(lambda t: 'trained' if t else 'frozen', trained)

  return optax.multi_transform({'trained': tx, 'frozen': optax.set_to_zero()}, labels)
