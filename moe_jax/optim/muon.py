"""Muon as DeepSeek-V4 trains with it: orthogonalised momentum for matrices, AdamW for the rest."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import P

from moe_jax.config import OptimConfig
from moe_jax.optim.adamw import adamw
from moe_jax.optim.matrices import Layout, layout
from moe_jax.optim.newton_schulz import orthogonalize
from moe_jax.optim.schedules import schedule

# N matrices of one parameter  X rows  Y columns


class MomentumState(NamedTuple):
  momentum: Any  # float32, shaped and sharded as the parameters


def muon(cfg: OptimConfig, steps: int, *, seed: int = 0) -> optax.GradientTransformation:
  """Muon on every matrix of `optim.matrices`, AdamW on everything else. Gradients come in clipped.

  M <- mu M + G;  W <- W (1 - lr wd) - lr * rms * sqrt(max(X, Y)) * orthogonalize(mu M + G), so that
  an update's entries have root mean square `rms` = 0.18, as AdamW's do, and one learning rate
  serves both. AdamW takes embedding, output head, norms, biases and sinks; the router is a matrix
  like any other, since the report's list of exceptions does not name it. Decay leaves norms alone,
  as in `adamw`; the report does not say.

  Source: arXiv:2606.19348, section 2.4.
  """
  learning_rate = schedule(cfg, steps)
  rest = adamw(cfg, steps, eps=cfg.muon.adamw_eps, seed=seed)
  matrices = optax.chain(
    orthogonal_momentum(cfg.muon.momentum, rms=cfg.muon.update_rms, dtype=cfg.muon.dtype),
    optax.add_decayed_weights(cfg.weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  return optax.partition({'matrices': matrices, 'rest': rest}, _labels)


def _labels(params: Any) -> Any:
  def label(path: Any, leaf: Any) -> str:
    return 'rest' if layout(path[-1].key, leaf.ndim) is None else 'matrices'

  return jax.tree_util.tree_map_with_path(label, params)


def orthogonal_momentum(mu: float, *, rms: float, dtype: str) -> optax.GradientTransformation:
  """Gradients of matrices -> rms * sqrt(max(X, Y)) * orthogonalize(mu M + G), M the momentum."""

  def init(params: Any) -> MomentumState:
    return MomentumState(jax.tree.map(jnp.zeros_like, params))

  def update(grads: Any, state: MomentumState, params: Any = None):
    del params
    momentum = jax.tree.map(lambda m, g: mu * m + g, state.momentum, grads)

    def one(path: Any, m: jax.Array, g: jax.Array) -> jax.Array:
      found = layout(path[-1].key, m.ndim)
      assert found is not None
      size = max(math.prod(m.shape[i] for i in dims) for dims in (found.rows, found.columns))
      return rms * math.sqrt(size) * orthogonalize_sharded(mu * m + g, found, dtype=dtype)

    return jax.tree_util.tree_map_with_path(one, momentum, grads), MomentumState(momentum)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def orthogonalize_sharded(x: jax.Array, layout: Layout, *, dtype: str) -> jax.Array:
  """`orthogonalize` of every matrix in `x`, which comes and goes sharded as it is.

  Whole matrices are dealt out: one all_to_all along each mesh axis that splits rows or columns
  trades a part of every matrix for the whole of some, and a second one trades back, so a device
  sends and receives about twice its own share and holds no more than that. Along an axis that
  replicates the parameter nothing is traded: devices take turns among the matrices and gather the
  results. Where there are fewer matrices than devices, some devices get zeros to work on.
  """
  sharding = jax.typeof(x).sharding
  if sharding.mesh.empty:
    return _on_device(x, layout=layout, splits=(), replicas=(), dtype=dtype)
  spec = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
  splits = tuple(
    (spec[d], i) for i, d in enumerate(layout.rows + layout.columns, start=1) if spec[d] is not None
  )
  named = {a for entry in spec for a in (entry if isinstance(entry, tuple) else (entry,))}
  replicas = tuple(axis for axis in sharding.mesh.axis_names if axis not in named)
  body = functools.partial(_on_device, layout=layout, splits=splits, replicas=replicas, dtype=dtype)
  return jax.shard_map(body, in_specs=P(*spec), out_specs=P(*spec))(x)


def _on_device(
  x: jax.Array,
  *,
  layout: Layout,
  splits: tuple[tuple[Any, int], ...],
  replicas: tuple[str, ...],
  dtype: str,
) -> jax.Array:
  """This device's part of `orthogonalize_sharded`.

  Args:
    splits: (mesh axis, dimension it splits), the dimensions counted in matrix order with all that
      count matrices as dimension 0.
  """
  num_batch = len(layout.batch)
  ordered = x.transpose(layout.order)
  parts = ordered.reshape(-1, *ordered.shape[num_batch:])
  num = parts.shape[0]
  # every device must get the same number of matrices: zeros fill up
  dealt = math.prod(jax.lax.axis_size(a) for a in (*replicas, *(a for a, _ in splits)))
  parts = jnp.pad(parts, [(0, -num % dealt)] + [(0, 0)] * (parts.ndim - 1))

  if replicas:
    turn, turns = jax.lax.axis_index(replicas), jax.lax.axis_size(replicas)
    mine = parts.shape[0] // turns
    parts = jax.lax.dynamic_slice_in_dim(parts, turn * mine, mine)
  for axis, dim in splits:
    parts = jax.lax.all_to_all(parts, axis, 0, dim, tiled=True)
  num_rows = len(layout.rows)
  shape_NXY = (
    parts.shape[0],
    math.prod(parts.shape[1 : 1 + num_rows]),
    math.prod(parts.shape[1 + num_rows :]),
  )
  parts = orthogonalize(parts.reshape(shape_NXY), dtype=dtype).reshape(parts.shape)
  for axis, dim in reversed(splits):
    parts = jax.lax.all_to_all(parts, axis, dim, 0, tiled=True)
  if replicas:
    parts = jax.lax.all_gather(parts, replicas, tiled=True, to='invarying')

  ordered = parts[:num].reshape(ordered.shape)
  return ordered.transpose([layout.order.index(d) for d in range(x.ndim)])
