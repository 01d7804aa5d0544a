"""One training step and one evaluation step, as pure functions."""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from moe_jax import routing
from moe_jax.config import RunConfig
from moe_jax.models import mtp
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Decoder, Output, head_DV
from moe_jax.ops.cross_entropy import total_loss
from moe_jax.optim import judge, schedule, trains
from moe_jax.precision import compute_copy, policy
from moe_jax.train.state import TrainState, make_model, make_optimizer

# B batch  S sequence  M micro-batches  L layers with experts  E experts  V vocabulary

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def _where(batch: Batch) -> Where:
  start_B = jnp.zeros_like(batch['tokens'][:, 0])
  return Where(batch['tokens'], batch['positions'], batch['segments'], start_B)


def _apply(model: Decoder, params: Any, router: Any, batch: Batch):
  """Sum of token losses, and the model's output."""
  variables = {'params': params, 'router': router}
  out = cast(Output, model.apply(variables, _where(batch)))
  head = head_DV(params, model.policy)
  return total_loss(out.hidden_BSD, head, batch['targets'], batch['loss_mask']), out


def _split(batch: Batch, parts: int) -> Batch:
  """[B, ...] -> [M, B/M, ...]; each part keeps rows of every device."""

  def split(a: jax.Array) -> jax.Array:
    return jnp.moveaxis(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0)

  return jax.tree.map(split, batch)


def count_targets(cfg: RunConfig, batch: Batch) -> tuple[jax.Array, ...]:
  """Valid targets: the model's, then those of each multi-token prediction module."""
  ahead = range(1, cfg.model.mtp.num_modules + 1)
  return (batch['loss_mask'].sum(), *(mtp.targets(batch, k)[1].sum() for k in ahead))


def _mtp_loss(
  cfg: RunConfig, params: Any, out: Output, part: Batch, num_targets: tuple[jax.Array, ...]
) -> jax.Array:
  """Mean over modules of the loss per valid target of that module, without its weight.

  The paper divides every module's sum by the sequence's length; a mean over the targets that the
  module has keeps the losses comparable where documents are short.
  """
  head = head_DV(params, policy(cfg.precision))
  total = jnp.zeros((), jnp.float32)
  for k, (hidden_BSD, num) in enumerate(zip(out.mtp_hidden, num_targets, strict=True), start=1):
    total += total_loss(hidden_BSD, head, *mtp.targets(part, k)) / jnp.maximum(num, 1)
  return total / len(num_targets)


def mean_loss(
  cfg: RunConfig,
  model: Decoder,
  params: Any,
  router: Any,
  part: Batch,
  *,
  num_targets: tuple[jax.Array, ...],
) -> tuple[jax.Array, Metrics]:
  """What one micro-batch adds to the loss of its batch, and what was seen on the way.

  To the language loss comes what layers report under names that end in `_loss`, summed over layers.

  Args:
    num_targets: of the whole batch, by `count_targets`.
  """
  total, out = _apply(model, params, router, part)
  lm = total / jnp.maximum(num_targets[0], 1).astype(jnp.float32)
  losses = {'balance_loss': jnp.zeros((), jnp.float32)}
  for name, of_layer_L in out.aux.items():
    if name.endswith('_loss'):
      losses[name] = of_layer_L.sum() / cfg.microbatches
  loss = sum(losses.values(), start=lm)
  seen: Metrics = {}
  if 'load_E' in out.aux:
    seen = {'load_LE': out.aux['load_E'], 'entropy_L': out.aux['entropy'] / cfg.microbatches}
  if cfg.model.mtp.num_modules:
    losses['mtp_loss'] = _mtp_loss(cfg, params, out, part, num_targets[1:])
    loss += cfg.model.mtp.loss_weight * losses['mtp_loss']
  return loss, {'loss': loss, 'lm_loss': lm, **losses, **seen}


def loss_and_grads(
  cfg: RunConfig, model: Decoder, params: Any, router: Any, batch: Batch
) -> tuple[Metrics, Any]:
  """Losses, counts and gradients of a whole batch, computed in `cfg.microbatches` parts.

  Token losses are averaged over the valid targets of the whole batch, layers' losses over parts,
  and `load_LE` counts every token of every part and device. Gradients of one part are in compute
  precision, the sum over parts is float32.
  """
  num_targets = count_targets(cfg, batch)
  parts = cfg.microbatches
  params = compute_copy(model.policy, params)

  def loss_fn(params: Any, part: Batch):
    return mean_loss(cfg, model, params, router, part, num_targets=num_targets)

  grad_fn = jax.grad(loss_fn, has_aux=True)
  if parts == 1:
    grads, seen = grad_fn(params, batch)
    return seen, grads

  def add(carry: Any, part: Batch):
    return jax.tree.map(jnp.add, carry, grad_fn(params, part)), None

  def zeros_of(shape: Any) -> jax.Array:
    dtype = jnp.promote_types(shape.dtype, jnp.float32) if _is_real(shape) else shape.dtype
    return jnp.zeros(shape.shape, dtype, out_sharding=shape.sharding)

  shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda a: a[0], _split(batch, parts)))
  zeros = jax.tree.map(zeros_of, shapes)
  (grads, seen), _ = jax.lax.scan(add, zeros, _split(batch, parts))
  return seen, grads


def _is_real(a: Any) -> bool:
  return jnp.issubdtype(a.dtype, jnp.floating)


def router_metrics(load_LE: jax.Array, entropy_L: jax.Array, bias_LE: jax.Array) -> Metrics:
  """Per-layer health of the routing, from the counts of one global batch.

  max_vio: max load / mean load - 1 (arXiv:2408.15664). load_entropy: of the share of each expert,
  over its maximum. entropy: mean over tokens of the gate's own, over its maximum.
  """
  mean_L1 = jnp.maximum(load_LE.mean(-1, keepdims=True), 1e-9)
  share_LE = load_LE / jnp.maximum(load_LE.sum(-1, keepdims=True), 1)
  entropy_of_load = -jax.scipy.special.xlogy(share_LE, share_LE).sum(-1)
  return {
    'router/max_vio': (load_LE / mean_L1).max(-1) - 1,
    'router/load_entropy': entropy_of_load / jnp.log(load_LE.shape[-1]),
    'router/entropy': entropy_L,
    'router/dead_experts': (load_LE == 0).sum(-1),
    'router/bias_norm': jnp.linalg.norm(bias_LE, axis=-1),
    'router/load': load_LE / mean_L1,
  }


def _layers(router: Any) -> list[tuple[str, list[str]]]:
  """The names in `router`, in the order of the layers: [(group, layers of its pattern)], then the
  multi-token prediction modules, whose one layer is called block."""
  by_number = lambda name: int(name.rsplit('_', 1)[1])
  groups = sorted((name for name in router if name.startswith('group_')), key=by_number)
  ahead = sorted((name for name in router if name.startswith('mtp_')), key=by_number)
  return [(g, sorted(router[g], key=by_number)) for g in groups] + [(m, ['block']) for m in ahead]


def stack_bias(router: Any, num_experts: int) -> jax.Array:
  """The biases of all layers as [L, E]: groups in order, repeats before pattern positions, then
  multi-token prediction.

  A hash-routed layer has no bias, and zeros here.
  """
  stacked = []
  for group, layers in _layers(router):
    bias = jnp.stack([_bias(router[group][name]['moe'], num_experts) for name in layers], axis=-2)
    stacked.append(bias.reshape(-1, bias.shape[-1]))
  return jnp.concatenate(stacked)


def _bias(moe: Any, num_experts: int) -> jax.Array:
  if 'bias_E' in moe:
    return moe['bias_E']
  return jnp.zeros((*moe['expert_VK'].shape[:-2], num_experts), jnp.float32)


def unstack_bias(router: Any, bias_LE: jax.Array) -> Any:
  """Inverse of `stack_bias`: the tree of `router` with the values of `bias_LE`; tables stay."""
  new, at = {}, 0
  for group, layers in _layers(router):
    lead = _bias(router[group][layers[0]]['moe'], bias_LE.shape[-1]).shape[:-1]
    num = math.prod(lead) * len(layers)
    rows = bias_LE[at : at + num].reshape(*lead, len(layers), -1)
    at += num
    new[group] = {
      name: {'moe': {'bias_E': rows[..., i, :]}}
      if 'bias_E' in router[group][name]['moe']
      else router[group][name]
      for i, name in enumerate(layers)
    }
  return new


def _where_trained(cfg: RunConfig, new: Any, old: Any) -> Any:
  trained = trains(cfg.optim.trainable, new)
  return jax.tree.map(lambda t, a, b: a if t else b, trained, new, old)


def make_train_step(cfg: RunConfig) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The step of a run: (state, batch) -> (state, metrics), ready for jit with the state donated.

  A refused step (see optim.guard) changes nothing but the counters. What `optim.trainable` leaves
  out, selection biases included, stays as it is.
  """
  model, tx = make_model(cfg), make_optimizer(cfg)
  ideas = routing.choose(cfg.balance, cfg.routing)
  learning_rate = schedule(cfg.optim, cfg.steps)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    seen, grads = loss_and_grads(cfg, model, state.params, state.router, batch)
    grads = _where_trained(cfg, grads, jax.tree.map(jnp.zeros_like, grads))
    # the squares' sum is float32 whatever the gradients are; the cast is part of the reduction
    grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    ok, guard = judge(state.guard, seen['loss'], grad_norm, cfg.guard)
    clip = jnp.minimum(1.0, cfg.optim.clip_norm / jnp.maximum(grad_norm, 1e-30))
    grads = jax.tree.map(lambda g: g * clip, grads)
    updates, opt = tx.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)

    metrics = {f'train/{name}': seen[name] for name in seen if name.endswith('loss')}
    router = state.router
    if router:
      bias_LE = stack_bias(router, seen['load_LE'].shape[-1])
      for idea in ideas:
        bias_LE = idea.update_bias(bias_LE, seen['load_LE'])
      router = _where_trained(cfg, unstack_bias(router, bias_LE), router)
      metrics |= router_metrics(seen['load_LE'], seen['entropy_L'], bias_LE)

    proposed = (params, router, opt)
    kept = (state.params, state.router, state.opt)
    params, router, opt = jax.tree.map(lambda new, old: jnp.where(ok, new, old), proposed, kept)
    metrics |= {
      'train/grad_norm': grad_norm,
      'train/lr': jnp.asarray(learning_rate(state.guard.accepted)),
      'guard/skipped': (~ok).astype(jnp.int32),
      'guard/skipped_total': guard.skipped,
      'guard/streak': guard.streak,
    }
    return TrainState(state.step + 1, state.batch + 1, params, router, opt, guard), metrics

  return _with_precision(cfg, train_step)


def make_eval_step(
  cfg: RunConfig,
) -> Callable[[TrainState, Batch, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
  """(state, batch, bytes_V) -> nats, targets and text bytes of the batch, each summed."""
  model = make_model(cfg)

  def eval_step(state: TrainState, batch: Batch, bytes_V: jax.Array):
    nats, _ = _apply(model, state.params, state.router, batch)
    mask = batch['loss_mask']
    length_BS = bytes_V.at[batch['targets']].get(out_sharding=jax.typeof(mask).sharding)
    return nats, mask.sum(), jnp.where(mask, length_BS, 0).sum()

  return _with_precision(cfg, eval_step)


def _with_precision(cfg: RunConfig, function: Callable) -> Callable:
  def wrapped(*args):
    with jax.default_matmul_precision(policy(cfg.precision).matmul):
      return function(*args)

  return wrapped
