"""What a run will cost, known before it starts: parameters, FLOPs a token, bytes a device."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.models import mtp
from moe_jax.ops.cross_entropy import CHUNK_BYTES
from moe_jax.precision import compute_copy, policy_of, quantized_copy
from moe_jax.train.state import TrainState, make_model
from moe_jax.train.step import count_targets, mean_loss


class Count(NamedTuple):
  total: int
  active: int  # used by one token


_COMPONENTS = {
  'embedding_VD': 'embedding',
  'head_DV': 'output head',
  'attention': 'attention',
  'indexer': 'indexer',
  'attention_residual': 'hyper-connections',
  'feed_forward_residual': 'hyper-connections',
  'leave': 'hyper-connections',
  'dense': 'dense feed-forward',
  'shared': 'shared experts',
  'gate_up_ED2F': 'routed experts',
  'down_EFD': 'routed experts',
  'router_DE': 'router',
  'bias_E': 'router',
}


def _named_sizes(tree: Any) -> Iterator[tuple[list[str], int]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield [key.key for key in path], math.prod(leaf.shape)


def parameters(cfg: ModelConfig, params: Any) -> dict[str, Count]:
  """Parameters by component; a token uses top_k of the routed experts, and all of the rest.

  All of multi-token prediction is one component, 'mtp': published totals leave it out, and so does
  `published`.
  """
  counts: dict[str, Count] = {}
  for path, size in _named_sizes(params):
    name = next((_COMPONENTS[key] for key in reversed(path) if key in _COMPONENTS), 'norms')
    active = size * cfg.moe.top_k // cfg.moe.num_experts if name == 'routed experts' else size
    name = 'mtp' if path[0].startswith('mtp_') else name
    old = counts.get(name, Count(0, 0))
    counts[name] = Count(old.total + size, old.active + active)
  return counts


def published(counts: dict[str, Count]) -> Count:
  """The sum as model cards state it: without multi-token prediction."""
  main = [count for name, count in counts.items() if name != 'mtp']
  return Count(sum(c.total for c in main), sum(c.active for c in main))


def flops_per_token(cfg: ModelConfig, params: Any, sequence_length: int) -> float:
  """Forward and backward, of the model's own operations: nothing recomputed, no padding.

  Two a multiply-add, three times the forward pass for both. Attention counts the causal half of its
  scores, and of sparse kinds only the keys attended to, whatever the implementation computes;
  looking up the embedding is no arithmetic. Each module of multi-token prediction is one more layer
  and one more use of the output head.
  """
  counts = parameters(cfg, params)
  weights = sum(c.active for name, c in counts.items() if name not in ('embedding', 'norms'))
  ahead = cfg.mtp.num_modules
  weights += ahead * counts['output head'].active
  layers = [*cfg.layers, *[mtp.layer(cfg)] * ahead]
  scores = sum(_score_work(cfg, layer.attention, sequence_length) for layer in layers)
  return 3 * 2 * (weights + scores)


def _score_work(cfg: ModelConfig, kind: str, length: int) -> float:
  """Multiply-adds of one query with its keys and their values, mean over a sequence, all heads."""
  width, every = _score_width(cfg, kind), length / 2
  c = cfg.compressed
  match kind:
    case 'sliding':
      return width * _mean_keys(length, c.window)
    case 'hca':
      return width * (_mean_keys(length, c.window) + every / c.hca_ratio)
    case 'csa':
      entries = every / c.csa_ratio
      if c.stage == 'sparse':
        entries = _mean_keys(length, c.index_top_k * c.csa_ratio) / c.csa_ratio
      index = c.num_index_heads * c.d_index * every / c.csa_ratio
      return index + width * (_mean_keys(length, c.window) + entries)
    case 'dsa':
      index = cfg.dsa.num_index_heads * cfg.dsa.d_index * every
      sparse = cfg.dsa.stage == 'sparse'
      return index + width * (_mean_keys(length, cfg.dsa.index_top_k) if sparse else every)
    case 'nsa':
      n = cfg.nsa
      chosen = _mean_keys(length, n.top_blocks * n.select_length)
      return width * (every / n.compress_stride + chosen + _mean_keys(length, n.window))
    case 'moba':
      b = cfg.moba
      means = b.num_heads * b.d_head * every / b.block_size
      return means + width * _mean_keys(length, (b.top_k + 1) * b.block_size)
  return width * every


def _mean_keys(length: int, most: int) -> float:
  """Keys a query attends to, mean over a sequence, where it attends to `most` of those before."""
  return length / 2 if length <= most else most - most * most / (2 * length)


def _score_width(cfg: ModelConfig, kind: str) -> int:
  """Multiply-adds of one query with one key and its value, over all heads."""
  match kind:
    case 'mla' | 'dsa':
      c = cfg.mla if kind == 'mla' else cfg.dsa
      return c.num_heads * (c.d_nope + c.d_rope + c.d_value)
    case 'nsa' | 'moba':
      c = cfg.nsa if kind == 'nsa' else cfg.moba
      return c.num_heads * (c.d_head + c.d_value)
    case 'full':
      return cfg.full.num_heads * 2 * cfg.full.d_head
    case 'sliding' | 'csa' | 'hca':
      return cfg.compressed.num_heads * 2 * cfg.compressed.d_head
  raise ValueError(f'no cost is known for attention={kind!r}.')


def bytes_per_device(tree: Any) -> int:
  """Bytes that one device holds of a tree of ShapeDtypeStruct with shardings."""

  def size(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize

  return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def predicted_bytes(cfg: RunConfig, state: TrainState) -> int:
  """Peak bytes of a training step on one device.

  State, the rounded copy of the parameters that a step multiplies with, gradients, what the
  backward pass of one micro-batch keeps (exact, from its traced forward pass), and the larger of
  two blocks of logits and what is made again of one layer under remat. A scan has room for all
  gradients from the start; of unrolled layers they come as what was kept goes. Buffers within one
  operation are not counted, nor what XLA keeps of unrolled layers that remat leaves to be made
  again (unless `model.strict_remat` forbids it).
  """
  copy = jax.eval_shape(functools.partial(compute_copy, policy_of(cfg)), state.params)
  kept, layers = _kept_bytes(cfg, state, copy), cfg.model.num_layers
  logits = 4 * cfg.tokens_per_step // cfg.microbatches * cfg.model.vocab_size
  work = 2 * min(CHUNK_BYTES, logits // jax.sharding.get_abstract_mesh().size)
  if cfg.model.remat != 'none':
    plain = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat='none'))
    work = max(work, (_kept_bytes(plain, state, copy) - kept) // layers)
  held = bytes_per_device(state) + _operand_bytes(cfg, state, copy)
  if cfg.model.unroll_layers and cfg.microbatches == 1:
    return held + max(kept + work, bytes_per_device(copy))
  # sums over micro-batches are float32
  gradients = bytes_per_device(copy if cfg.microbatches == 1 else state.params)
  return held + gradients + kept + work


def _operand_bytes(cfg: RunConfig, state: TrainState, copy: Any) -> int:
  """Bytes of the rounded parameters: of those quantised once a step there is no other copy."""
  policy = policy_of(cfg)
  ready = jax.eval_shape(functools.partial(quantized_copy, policy), state.params)
  total = bytes_per_device(ready)
  for (path, new), old in zip(
    jax.tree_util.tree_leaves_with_path(copy), jax.tree.leaves(state.params), strict=True
  ):
    at = ready.get('fp8', {})
    for key in path:
      at = at.get(key.key, {}) if isinstance(at, dict) else at
    if new.dtype != old.dtype and not at:
      total += bytes_per_device(new)
  return total


def _kept_bytes(cfg: RunConfig, state: TrainState, copy: Any) -> int:
  """Bytes kept between the passes of one micro-batch, the parameters themselves left out."""
  model = make_model(cfg, training=True)
  rows, length = cfg.data.batch_size // cfg.microbatches, cfg.data.sequence_length

  def zeros(dtype: Any) -> jax.Array:
    return jnp.zeros((rows, length), dtype, out_sharding=sh.TOKENS)

  def kept(params: Any, rest: Any) -> Any:
    batch = {name: zeros(jnp.int32) for name in ('tokens', 'targets', 'segments', 'positions')}
    batch['loss_mask'] = zeros(jnp.bool_)
    targets = count_targets(cfg, batch)
    loss = lambda p: mean_loss(cfg, model, p, rest, batch, num_targets=targets)
    return jax.vjp(loss, params, has_aux=True)[1]

  residuals = jax.eval_shape(kept, copy, state.rest)
  return max(bytes_per_device(residuals) - bytes_per_device(copy), 0)
