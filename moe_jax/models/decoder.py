"""The decoder: embedding, groups of scanned layers, final norm, output head."""

import functools
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.config import LayerKind, ModelConfig
from moe_jax.models import mtp
from moe_jax.models.attention import KINDS, Where
from moe_jax.models.block import Block
from moe_jax.models.grouping import group_layers
from moe_jax.models.layers import RMSNorm, weight
from moe_jax.models.residual import RESIDUALS
from moe_jax.ops import embedding
from moe_jax.precision import Policy
from moe_jax.routing import Balance

# B batch  S sequence  D model  V vocabulary  L layers with experts  E experts

# what is kept of a layer for its backward pass: results that took much arithmetic for their bytes,
# and the routing, which is small and slow to find
_SELECTIVE = frozenset({
  'attention_out', 'attention_lse', 'router_logits', 'router_choice', 'expert_plan',
  'expert_hidden',
})  # fmt: skip
# these too, so that only norms, gathers and other cheap passes are made again
_LIGHT = _SELECTIVE | {'attention_qkv', 'attention_latent_kv', 'stream', 'dense_hidden'}
# with linear layers in FP8, MLA's keys and values are made again of their latents, which are a
# ninth of their size (arXiv:2412.19437, 3.2.3)
_LIGHT_FP8 = _LIGHT - {'attention_latent_kv'}


def _keeps(names: frozenset[str], prim: Any, *_: Any, **params: Any) -> bool:
  # jax names nothing within cuDNN's attention: its output and statistics are known by the call
  return prim.name.startswith('dot_product_attention_fwd') or params.get('name') in names


_REMAT_POLICIES = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'selective': functools.partial(_keeps, _SELECTIVE),
  'light': functools.partial(_keeps, _LIGHT),
}


def _remat_policy(cfg: ModelConfig, policy: Policy) -> Any:
  fp8 = cfg.remat == 'light' and policy.linear.is_fp8
  return functools.partial(_keeps, _LIGHT_FP8) if fp8 else _REMAT_POLICIES[cfg.remat]


class Output(NamedTuple):
  hidden_BSD: jax.Array  # after the final norm
  aux: dict[str, jax.Array]  # what layers measured, by name: leading dim the layers that did
  cache: Any  # a list, one entry a layer group; None without a cache
  # what module 1 of multi-token prediction reads; only with a cache
  state: jax.Array | None = None
  # of each multi-token prediction module, after its norm; none when decoding
  mtp_hidden: tuple[jax.Array, ...] = ()


class Pattern(nn.Module):
  """One turn of a scan: the layers of a group's pattern, in order."""

  kinds: tuple[LayerKind, ...]
  cfg: ModelConfig
  balance: Balance
  policy: Policy
  intermediates: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, caches: Any, where: Where):
    new, aux = [], []
    for i, kind in enumerate(self.kinds):
      block = Block(kind, self.cfg, self.balance, self.policy, name=f'layer_{i}')
      entering = {'entering': x} if self.intermediates else {}
      x, cache, seen = block(x, where, None if caches is None else caches[i])
      new.append(cache)
      aux.append(seen | entering)
    return x, (None if caches is None else new, aux)


class Decoder(nn.Module):
  """A language model of the family. `init` and `apply` are its pure functions.

  Variables: collections `params` (float32 master weights), `router` (selection biases) and `ideas`
  (what balancing ideas carry); `apply` reads the last two and the training step updates them by the
  rules of moe_jax.routing. `counts`, if given, holds sums over the batch that this is a part of.
  """

  cfg: ModelConfig
  policy: Policy
  balance: Balance = Balance()

  @nn.compact
  def __call__(self, where: Where, cache: Any = None, *, intermediates: bool = False) -> Output:
    """Reads tokens.

    Args:
      cache: from `empty_cache`, to decode; None to train.
      intermediates: also returns aux['entering'], the residual stream entering each layer, [L, B,
        S, D] or [L, B, S, J, D].
    """
    c, V, D = self.cfg, self.cfg.vocab_size, self.cfg.d_model
    embedding_VD = weight(self, 'embedding_VD', (V, D), sh.EMBEDDING_VD, std=c.init_std)
    weight(self, 'head_DV', (D, V), sh.HEAD_DV, std=c.init_std)
    embedded_BSD = embed(embedding_VD, where.token_BS, self.policy)
    residual = RESIDUALS[c.residual]
    x = residual.enter(c, embedded_BSD)

    caches, aux = [], []
    for i, (kinds, repeats) in enumerate(group_layers(c.layers)):
      pattern = Pattern
      if c.remat != 'none':
        keeps = _remat_policy(c, self.policy)
        pattern = nn.remat(Pattern, prevent_cse=c.strict_remat, policy=keeps)
      group = nn.scan(
        pattern,
        variable_axes={'params': 0, 'router': 0, 'ideas': 0, 'counts': 0, 'probes': 0, 'fp8': 0},
        split_rngs={'params': True, 'ideas': True},
        in_axes=cast(Any, (0, nn.broadcast)),
        length=repeats,
        unroll=repeats if c.unroll_layers else 1,
      )(kinds, c, self.balance, self.policy, intermediates, name=f'group_{i}')
      x, (new, seen) = group(x, None if cache is None else cache[i], where)
      caches.append(new)
      aux.append(seen)
    x_BSD = residual.leave(c, name='leave')(x)
    hidden_BSD = RMSNorm(c.norm_eps, name='final_norm')(x_BSD)
    if cache is not None:
      return Output(hidden_BSD, stack_layers(aux), caches, mtp.state_of(c, hidden_BSD, x))

    module = mtp.MTP
    if c.remat != 'none':
      module = nn.remat(mtp.MTP, policy=_remat_policy(c, self.policy))
    previous, ahead = mtp.state_of(c, hidden_BSD, x), []
    for k, name in enumerate(mtp.names(c), start=1):
      out = module(c, self.balance, self.policy, name=name)(
        previous, mtp.shift(embedded_BSD, k), mtp.look_ahead(where, k), None
      )
      previous = out.state
      ahead.append(out.hidden_BSD)
      aux.append([jax.tree.map(lambda a: a[None], out.aux)])
    return Output(hidden_BSD, stack_layers(aux), None, mtp_hidden=tuple(ahead))


def embed(embedding_VD: jax.Array, token_BS: jax.Array, policy: Policy) -> jax.Array:
  """Rows of the stored table in compute precision, [B, S, D]."""
  return embedding.embed(embedding_VD, token_BS, dtype=policy.activations)


def head_DV(params: Any, policy: Policy) -> jax.Array:
  """The output head in compute precision, its FSDP share gathered."""
  return jax.sharding.reshard(policy.cast(params['head_DV']), sh.gathered(sh.HEAD_DV))


def stack_layers(aux: list[list[dict[str, jax.Array]]]) -> dict[str, jax.Array]:
  """[group][layer of the pattern] of [repeats, ...] -> by name, [L, ...] in the order of the
  layers.

  L counts the layers that measured the name.
  """
  stacked: dict[str, list[jax.Array]] = {}
  for group in aux:
    for name in dict.fromkeys(name for layer in group for name in layer):
      together = jnp.stack([layer[name] for layer in group if name in layer], axis=1)
      stacked.setdefault(name, []).append(together.reshape(-1, *together.shape[2:]))
  return {name: jnp.concatenate(parts) for name, parts in stacked.items()}


def empty_cache(cfg: ModelConfig, *, batch: int, length: int, dtype: Any) -> list[list[Any]]:
  """Room for `length` tokens a row: by group, by layer of its pattern, [repeats, ...] arrays."""
  cache = []
  for kinds, repeats in group_layers(cfg.layers):
    layers = []
    for kind in kinds:
      make = KINDS[kind.attention].empty_cache
      one = make(cfg.attention_config(kind.attention), batch, length, dtype)
      layers.append(jax.tree.map(lambda a: jnp.stack([a] * repeats), one))  # noqa: B023
    cache.append(layers)
  return cache
