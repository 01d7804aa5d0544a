"""The DeepSeekMoE feed-forward: routed experts by top-k, plus shared ones for every token."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax import sharding as sh
from moe_jax.config import MoEConfig
from moe_jax.models.attention.base import Where
from moe_jax.models.layers import FeedForward, weight
from moe_jax.ops.experts import expert_mlp
from moe_jax.ops.route import gate_logits, hash_table, scores, top_k_route, weigh
from moe_jax.precision import Policy
from moe_jax.routing import Gate, Idea
from moe_jax.routing.base import selected

# B batch  S sequence  D model  E experts  F expert width  K experts a token


class MoE(nn.Module):
  """Routed plus shared experts. Source: arXiv:2401.06066, 3; arXiv:2412.19437, 2.1.2.

  With `num_hash_ids`, a frozen table chooses a token's experts by its id, and the gate only weighs
  them; such a layer has neither a selection bias nor a balance loss. Source: arXiv:2606.19348.
  """

  cfg: MoEConfig
  balance: tuple[Idea, ...]
  std: float
  policy: Policy
  num_hash_ids: int = 0  # rows of the table; 0: the gate chooses

  @nn.compact
  def __call__(self, x_BSD: jax.Array, where: Where) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the output and, in float32, `load_E`, `balance_loss` and `entropy`.

    `load_E` counts the tokens routed to each expert; `entropy` is the gate's, over its maximum.
    Padding is routed like any token but counted nowhere.
    """
    valid_BS = where.segment_BS > 0
    c, D, E, F = self.cfg, x_BSD.shape[-1], self.cfg.num_experts, self.cfg.d_expert
    router_DE = weight(self, 'router_DE', (D, E), sh.MATRIX_DX, std=self.std)
    gate_up_ED2F = weight(self, 'gate_up_ED2F', (E, D, 2, F), sh.EXPERTS_ED2F, std=self.std)
    down_EFD = weight(self, 'down_EFD', (E, F, D), sh.EXPERTS_EFD, std=self.std)

    logits_BSE = gate_logits(x_BSD, jax.sharding.reshard(router_DE, sh.gathered(sh.MATRIX_DX)))
    logits_BSE = checkpoint_name(logits_BSE, 'router_logits')
    score_BSE = scores(logits_BSE, c.score)
    expert_BSK, weight_BSK = (self._hash if self.num_hash_ids else self._choose)(score_BSE, where)
    y_BSD = expert_mlp(
      x_BSD,
      expert_BSK,
      weight_BSK,
      self.policy.cast(gate_up_ED2F),
      self.policy.cast(down_EFD),
      swiglu_limit=c.swiglu_limit,
    )
    if c.num_shared:
      shared = FeedForward(c.num_shared * F, self.std, self.policy, c.swiglu_limit, name='shared')
      y_BSD += shared(x_BSD)

    ideas = () if self.num_hash_ids else self.balance
    gate = Gate(logits_BSE, score_BSE, expert_BSK, valid_BS)
    load_E = jnp.where(valid_BS[..., None], selected(expert_BSK, E), 0).sum((0, 1))
    p_BSE = jax.nn.softmax(logits_BSE, axis=-1)
    entropy_BS = -jax.scipy.special.xlogy(p_BSE, p_BSE).sum(-1) / jnp.log(E)
    aux = {
      'load_E': load_E,
      'balance_loss': sum((idea.loss(gate) for idea in ideas), jnp.zeros((), jnp.float32)),
      'entropy': jnp.where(valid_BS, entropy_BS, 0).sum() / jnp.maximum(valid_BS.sum(), 1),
    }
    return y_BSD, aux

  def _choose(self, score_BSE: jax.Array, where: Where) -> tuple[jax.Array, jax.Array]:
    del where
    c = self.cfg
    bias_E: Any = self.variable(
      'router', 'bias_E', jnp.zeros, (c.num_experts,), jnp.float32, out_sharding=sh.VECTOR
    ).value
    return top_k_route(
      score_BSE,
      bias_E,
      k=c.top_k,
      num_groups=c.num_groups,
      top_groups=c.top_groups,
      group_score=c.group_score,
      normalize=c.normalize_weights,
      scale=c.weight_scale,
    )

  def _hash(self, score_BSE: jax.Array, where: Where) -> tuple[jax.Array, jax.Array]:
    c = self.cfg

    def make() -> jax.Array:
      key = self.make_rng('params')
      return hash_table(key, num_ids=self.num_hash_ids, top_k=c.top_k, num_experts=c.num_experts)

    table_VK: Any = self.variable('router', 'expert_VK', make).value
    expert_BSK = table_VK.at[where.token_BS].get(out_sharding=sh.STREAM)
    return expert_BSK, weigh(
      score_BSE, expert_BSK, normalize=c.normalize_weights, scale=c.weight_scale
    )
