"""One training step and one evaluation step, as pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import routing
from moe_jax.config import RunConfig
from moe_jax.models import mtp
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Decoder, Output, head_DV
from moe_jax.ops.cross_entropy import total_loss
from moe_jax.optim import judge, schedule, trains
from moe_jax.precision import compute_copy, policy_of, quantized_copy
from moe_jax.train import layers
from moe_jax.train.state import TrainState, make_model, make_optimizer

# B batch  S sequence  M micro-batches  L layers with experts  E experts  K experts a token
# G domains  V vocabulary

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# what layers sum over tokens, see models.moe
ROUTER_SUMS = ('tokens', 'entropy', 'margin', 'choices', 'dropped')
CHOICES_KEPT = 2048  # tokens whose choices every evaluation returns


def _where(batch: Batch) -> Where:
  start_B = jnp.zeros_like(batch['tokens'][:, 0])
  return Where(batch['tokens'], batch['positions'], batch['segments'], start_B)


def _apply(model: Decoder, params: Any, rest: Any, batch: Batch):
  """Sum of token losses, and the model's output."""
  out = cast(Output, model.apply({'params': params, **rest}, _where(batch)))
  head = head_DV(params, model.policy)
  return total_loss(out.hidden_BSD, head, batch['targets'], batch['loss_mask']), out


def split(batch: Batch, parts: int) -> Batch:
  """[B, ...] -> [M, B/M, ...]; each part keeps rows of every device."""

  def one(a: jax.Array) -> jax.Array:
    return jnp.moveaxis(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0)

  return jax.tree.map(one, batch)


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
  head = head_DV(params, policy_of(cfg))
  total = jnp.zeros((), jnp.float32)
  for k, (hidden_BSD, num) in enumerate(zip(out.mtp_hidden, num_targets, strict=True), start=1):
    total += total_loss(hidden_BSD, head, *mtp.targets(part, k)) / jnp.maximum(num, 1)
  return total / len(num_targets)


def mean_loss(
  cfg: RunConfig,
  model: Decoder,
  params: Any,
  rest: Any,
  part: Batch,
  *,
  num_targets: tuple[jax.Array, ...],
) -> tuple[jax.Array, Metrics]:
  """What one micro-batch adds to the loss of its batch, and what was seen on the way.

  To the language loss comes what layers report under names that end in `_loss`, summed over layers.

  Args:
    rest: the model's variables beside its parameters, see `TrainState.rest`.
    num_targets: of the whole batch, by `count_targets`.
  """
  total, out = _apply(model, params, rest, part)
  lm = total / jnp.maximum(num_targets[0], 1).astype(jnp.float32)
  losses = {'balance_loss': jnp.zeros((), jnp.float32)}
  for name, of_layer_L in out.aux.items():
    if name.endswith('_loss'):
      losses[name] = of_layer_L.sum() / cfg.microbatches
  loss = sum(losses.values(), start=lm)
  seen: Metrics = {}
  if 'load_E' in out.aux:
    sums = {name: out.aux[name] for name in ROUTER_SUMS} | _of_ideas(out)
    seen = {'load_LE': out.aux['load_E']} | {f'sum/{name}': v for name, v in sums.items()}
  if cfg.model.mtp.num_modules:
    losses['mtp_loss'] = _mtp_loss(cfg, params, out, part, num_targets[1:])
    loss += cfg.model.mtp.loss_weight * losses['mtp_loss']
  return loss, {'loss': loss, 'lm_loss': lm, **losses, **seen}


def _of_ideas(out: Output) -> Metrics:
  """The sums of balancing ideas, 'idea.sum' of each layer that they serve."""
  return {name: value for name, value in out.aux.items() if '.' in name}


def loss_and_grads(
  cfg: RunConfig, model: Decoder, params: Any, rest: Any, batch: Batch
) -> tuple[Metrics, Any]:
  """Losses, counts and gradients of a whole batch, computed in `cfg.microbatches` parts.

  Token losses are averaged over the valid targets of the whole batch, layers' losses over parts,
  and `load_LE` counts every token of every part and device, as the sums `sum/...` do. Gradients of
  one part are in compute precision, the sum over parts is float32.
  """
  num_targets = count_targets(cfg, batch)
  parts = cfg.microbatches
  rest = rest | quantized_copy(model.policy, params)
  params = compute_copy(model.policy, params)
  if parts > 1 and model.balance.counts_first:
    rest = rest | {'counts': _count(cfg, model, params, rest, batch)}

  def loss_fn(params: Any, part: Batch):
    return mean_loss(cfg, model, params, rest, part, num_targets=num_targets)

  grad_fn = jax.grad(loss_fn, has_aux=True)
  if parts == 1:
    grads, seen = grad_fn(params, batch)
    if cfg.model.unroll_layers:
      # joined once, not anew by each kernel of the optimizer that reads them
      grads = jax.lax.optimization_barrier(grads)
    return seen, grads
  grads, seen = _sum_over_parts(lambda part: grad_fn(params, part), split(batch, parts))
  return seen, grads


def _sum_over_parts(function: Callable[[Batch], Any], parts: Batch) -> Any:
  """Sum of `function` over the leading dim of `parts`, one at a time, in float32 at least."""

  def add(carry: Any, part: Batch):
    return jax.tree.map(jnp.add, carry, function(part)), None

  def zeros_of(shape: Any) -> jax.Array:
    dtype = jnp.promote_types(shape.dtype, jnp.float32) if _is_real(shape) else shape.dtype
    return jnp.zeros(shape.shape, dtype, out_sharding=shape.sharding)

  shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], parts))
  return jax.lax.scan(add, jax.tree.map(zeros_of, shapes), parts)[0]


def _is_real(a: Any) -> bool:
  return jnp.issubdtype(a.dtype, jnp.floating)


def _count(cfg: RunConfig, model: Decoder, params: Any, rest: Any, batch: Batch) -> Any:
  """Collection `counts`: the ideas' sums over the whole batch, before any loss is computed."""
  see = lambda part: _of_ideas(_apply(model, params, rest, part)[1])
  sums = _sum_over_parts(see, split(batch, cfg.microbatches))
  return layers.unstack(rest['router'], 'bias_E', sums, to='sums')


def router_metrics(load_LE: jax.Array, sums: Metrics, bias_LE: jax.Array) -> Metrics:
  """Per-layer health of the routing, from the counts of one global batch.

  max_vio: max load / mean load - 1 (arXiv:2408.15664, on one batch). load_entropy: of the share of
  each expert, over its maximum; load_cv: deviation of the load over its mean. entropy: mean over
  tokens of the gate's own, over its maximum. margin: score of the worst chosen expert less that of
  the best other, bias included, mean over tokens. dropped: share of the choices. load: over mean.

  Args:
    sums: over tokens, as `ROUTER_SUMS` names them.
  """
  mean_L1 = jnp.maximum(load_LE.mean(-1, keepdims=True), 1e-9)
  share_LE = load_LE / jnp.maximum(load_LE.sum(-1, keepdims=True), 1)
  entropy_of_load = -jax.scipy.special.xlogy(share_LE, share_LE).sum(-1)
  tokens_L = jnp.maximum(sums['tokens'], 1)
  return {
    'router/max_vio': (load_LE / mean_L1).max(-1) - 1,
    'router/load_entropy': entropy_of_load / jnp.log(load_LE.shape[-1]),
    'router/load_cv': load_LE.std(-1) / mean_L1[:, 0],
    'router/entropy': sums['entropy'] / tokens_L,
    'router/margin': sums['margin'] / tokens_L,
    'router/dropped': sums['dropped'] / jnp.maximum(sums['choices'], 1),
    'router/dead_experts': (load_LE == 0).sum(-1),
    'router/bias_norm': jnp.linalg.norm(bias_LE, axis=-1),
    'router/load': load_LE / mean_L1,
  }


def update_routing(
  cfg: RunConfig,
  balance: routing.Balance,
  rest: Any,
  load_LE: jax.Array,
  sums: Metrics,
  progress: jax.Array,
) -> tuple[Any, jax.Array]:
  """The selection biases and what ideas carry after a step, as a new `rest`; and the biases [L, E].

  Hash-routed layers have neither; their rows of `load_LE` are passed over and their biases zero.
  """
  router, ideas = rest['router'], rest['ideas']
  gated = np.flatnonzero(layers.which_have(router, 'bias_E', 'expert_VK'))
  everywhere = len(gated) == load_LE.shape[0]
  if not len(gated):
    return rest, jnp.zeros_like(load_LE)
  bias_LE = layers.stack(router, 'bias_E')
  states = {idea.name: layers.stack(ideas, idea.name) for idea in balance.carriers}
  seen_LE = load_LE if everywhere else load_LE[gated]
  bias_LE, states = balance.update(bias_LE, states, seen_LE, sums, cfg.model.moe.top_k, progress)
  router = layers.merge(router, layers.unstack(router, 'bias_E', bias_LE))
  for name, state in states.items():
    ideas = layers.merge(ideas, layers.unstack(ideas, name, state))
  if not everywhere:
    bias_LE = jnp.zeros_like(load_LE).at[gated].set(bias_LE)
  return {'router': router, 'ideas': ideas}, bias_LE


def _where_trained(cfg: RunConfig, new: Any, old: Any) -> Any:
  trained = trains(cfg.optim.trainable, new)
  return jax.tree.map(lambda t, a, b: a if t else b, trained, new, old)


def make_train_step(cfg: RunConfig) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The step of a run: (state, batch) -> (state, metrics), ready for jit with the state donated.

  A refused step (see optim.guard) changes nothing but the counters. What `optim.trainable` leaves
  out, selection biases included, stays as it is.
  """
  model, tx = make_model(cfg, training=True), make_optimizer(cfg)
  learning_rate = schedule(cfg.optim, cfg.steps)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    seen, grads = loss_and_grads(cfg, model, state.params, state.rest, batch)
    grads = _where_trained(cfg, grads, jax.tree.map(jnp.zeros_like, grads))
    # the squares' sum is float32 whatever the gradients are; the cast is part of the reduction
    grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    ok, guard = judge(state.guard, seen['loss'], grad_norm, cfg.guard)
    clip = jnp.minimum(1.0, cfg.optim.clip_norm / jnp.maximum(grad_norm, 1e-30))
    metrics = {f'train/{name}': seen[name] for name in seen if name.endswith('loss')}
    rest = state.rest
    if state.router:
      sums = {key.removeprefix('sum/'): v for key, v in seen.items() if key.startswith('sum/')}
      progress = state.guard.accepted / cfg.steps
      new, bias_LE = update_routing(cfg, model.balance, rest, seen['load_LE'], sums, progress)
      rest = _where_trained(cfg, new, rest)
      metrics |= router_metrics(seen['load_LE'], sums, bias_LE)
      router_LDE = layers.stack(grads, 'router_DE')
      metrics['router/grad_norm'] = jnp.sqrt(jnp.square(router_LDE).sum((1, 2)))

    grads = jax.tree.map(lambda g: g * clip, grads)
    updates, opt = tx.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    proposed = (params, rest, opt)
    kept = (state.params, state.rest, state.opt)
    params, rest, opt = jax.tree.map(lambda new, old: jnp.where(ok, new, old), proposed, kept)
    metrics |= {
      'train/grad_norm': grad_norm,
      'train/lr': jnp.asarray(learning_rate(state.guard.accepted)),
      'guard/skipped': (~ok).astype(jnp.int32),
      'guard/skipped_total': guard.skipped,
      'guard/streak': guard.streak,
    }
    new = TrainState(
      state.step + 1, state.batch + 1, params, rest['router'], rest['ideas'], opt, guard
    )
    return new, metrics

  return _with_precision(cfg, train_step)


def jit_train_step(cfg: RunConfig) -> Any:
  """`make_train_step`, jitted as runs and benchmarks use it: the state is given away."""
  return jax.jit(make_train_step(cfg), donate_argnums=0)


class Evaluated(NamedTuple):
  """Sums over one batch of evaluation."""

  nats: jax.Array
  targets: jax.Array
  text_bytes: jax.Array
  routing: Metrics  # see `_routing_of`; empty without experts


def make_eval_step(
  cfg: RunConfig,
) -> Callable[[TrainState, Batch, jax.Array], Evaluated]:
  """(state, batch, bytes_V) -> nats, targets and text bytes of the batch, and its routing."""
  model = make_model(cfg)

  def eval_step(state: TrainState, batch: Batch, bytes_V: jax.Array):
    nats, out = _apply(model, state.params, state.rest, batch)
    mask = batch['loss_mask']
    length_BS = bytes_V.at[batch['targets']].get(out_sharding=jax.typeof(mask).sharding)
    text_bytes = jnp.where(mask, length_BS, 0).sum()
    return Evaluated(nats, mask.sum(), text_bytes, _routing_of(cfg, out, batch))

  return _with_precision(cfg, eval_step)


def _routing_of(cfg: RunConfig, out: Output, batch: Batch) -> Metrics:
  """What evaluation learns of the routing, the same on every device.

  load_LGE: tokens of each domain that chose each expert. pairs_LEE: tokens that chose both.
  chosen_LTK: the choices of the first `CHOICES_KEPT` tokens or so, in whole rows.
  """
  if 'load_BE' not in out.aux:
    return {}
  G = len(cfg.data.domains)
  domain_B = batch.get('domain', jnp.zeros_like(batch['tokens'][:, 0]))
  domain_BG = jax.nn.one_hot(domain_B, G)
  load_LGE = jnp.einsum(
    'bg,lbe->lge', domain_BG, out.aux['load_BE'], out_sharding=jax.P(None, None, None)
  )
  L, B, S, K = out.aux['chosen_BSK'].shape
  chosen_LBSK = jax.sharding.reshard(out.aux['chosen_BSK'], jax.P(None, None, None, None))
  rows = min(B, -(-CHOICES_KEPT // S))
  return {
    'load_LGE': load_LGE,
    'pairs_LEE': out.aux['pairs_EE'],
    'chosen_LTK': chosen_LBSK[:, :rows].reshape(L, rows * S, K),
  }


def _with_precision(cfg: RunConfig, function: Callable) -> Callable:
  def wrapped(*args):
    with jax.default_matmul_precision(policy_of(cfg).matmul):
      return function(*args)

  return wrapped
