"""Watching FP8: what quantisation does to each layer's activations, weights and gradients.

A second program runs the loss and its gradient on a batch now and then, with probes in the model
and without an optimizer; steps themselves stay as they are.
"""

# L layers  N measurements, ops.probe.NAMES

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import RunConfig
from moe_jax.models import probes
from moe_jax.models.grouping import group_layers
from moe_jax.ops.probe import NAMES, measure_blocks
from moe_jax.ops.quantize import Format
from moe_jax.precision import compute_copy, policy_of
from moe_jax.train.state import TrainState, make_model
from moe_jax.train.step import count_targets, mean_loss, split

Batch = dict[str, jax.Array]
PREFIX = 'fp8/'


def make_watch(cfg: RunConfig) -> Callable[[TrainState, Batch], dict[str, jax.Array]] | None:
  """(state, batch) -> `fp8/{activations,gradients,weights}_{NAME}`, each [L]; None without FP8.

  L counts all layers of the decoder. Of a layer's sites and matrices the worst counts: the largest,
  and of scale_min the smallest.
  """
  policy = policy_of(cfg)
  if not policy.linear.is_fp8:
    return None
  model = make_model(cfg, training=True)
  groups = [(len(kinds), repeats) for kinds, repeats in group_layers(cfg.model.layers)]

  def watch(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    part = jax.tree.map(lambda a: a[0], split(batch, cfg.microbatches))
    targets = count_targets(cfg, batch)
    params = compute_copy(policy, state.params)

    def loss(zeros: Any) -> jax.Array:
      rest = state.rest | {'probes': zeros}
      return mean_loss(cfg, model, params, rest, part, num_targets=targets)[0]

    seen = jax.grad(loss)(probes.zeros(groups))
    metrics = {}
    by_layer = [_layers(seen, i, layers) for i, (layers, _) in enumerate(groups)]
    sites_LS2N = jnp.concatenate(by_layer)
    for i, kind in enumerate(('activations', 'gradients')):
      metrics |= _named(kind, sites_LS2N[:, :, i])
    fmt = policy.linear.forward.formats()[1]
    weights = [_weights(params, i, layers, fmt) for i, (layers, _) in enumerate(groups)]
    return metrics | _named('weights', jnp.concatenate(weights))

  return jax.jit(watch)


def _named(kind: str, seen_LSN: jax.Array) -> dict[str, jax.Array]:
  return {
    f'{PREFIX}{kind}_{name}': seen_LSN[..., i].min(1)
    if name == 'scale_min'
    else seen_LSN[..., i].max(1)
    for i, name in enumerate(NAMES)
  }


def _layers(seen: Any, group: int, layers: int) -> jax.Array:
  """[repeats * layers, sites, 2, N] in the order of the layers."""
  of_layer = [
    jnp.stack(jax.tree.leaves(seen[f'group_{group}'][f'layer_{i}']), axis=1) for i in range(layers)
  ]
  return jnp.stack(of_layer, axis=1).reshape(-1, *of_layer[0].shape[1:])


def _weights(params: Any, group: int, layers: int, fmt: Format) -> jax.Array:
  """[repeats * layers, 1, N]: of the matrices of each layer, the worst."""
  found = []
  for i in range(layers):
    leaves = jax.tree_util.tree_leaves_with_path(params[f'group_{group}'][f'layer_{i}'])
    seen = [
      jax.lax.map(lambda w: measure_blocks(w, fmt), _matrix(path[-1].key, _whole(leaf)))
      for path, leaf in leaves
      if leaf.dtype != jnp.float32 and leaf.ndim >= 3
    ]
    worst = jnp.stack(seen, axis=1)
    low, high = worst.min(1), worst.max(1)
    is_low = jnp.array([name == 'scale_min' for name in NAMES])
    found.append(jnp.where(is_low, low, high)[:, None])
  return jnp.stack(found, axis=1).reshape(-1, 1, len(NAMES))


def _whole(leaf: jax.Array) -> jax.Array:
  """Gathered: blocks of 128 x 128 need not fit the shares of devices."""
  return jax.sharding.reshard(leaf, jax.P(*(None,) * leaf.ndim))


def _matrix(name: str, leaf: jax.Array) -> jax.Array:
  """[repeats, ..., rows, columns] of a stacked parameter, whatever dimensions make its columns."""
  if name.endswith('_ED2F'):
    return leaf.reshape(*leaf.shape[:3], -1)
  if name.endswith('_HVD'):
    return leaf.reshape(leaf.shape[0], -1, leaf.shape[-1])
  return leaf if name.endswith('_EFD') else leaf.reshape(*leaf.shape[:2], -1)


def lost_gradient(values: dict[str, Any], share: float) -> str | None:
  """The warning for metrics where a layer loses more than `share` of its gradient, or None."""
  lost_L = values.get(f'{PREFIX}gradients_lost', [])
  worst = max(range(len(lost_L)), key=lambda i: lost_L[i], default=None)
  if worst is None or lost_L[worst] <= share:
    return None
  return (
    f'FP8 loses {lost_L[worst]:.2%} of the gradient of layer {worst} to underflow '
    f'(log.lost_share={share:g}); see fp8/gradients_lost. Use block scales, e5m2 or bfloat16 for '
    'precision_overrides.linear_dgrad.'
  )
