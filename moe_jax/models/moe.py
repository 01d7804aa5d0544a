"""The DeepSeekMoE feed-forward: routed experts by top-k, plus shared ones for every token."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax import sharding as sh
from moe_jax.config import MoEConfig
from moe_jax.models.attention.base import Where
from moe_jax.models.layers import FeedForward, matrix, weight
from moe_jax.ops.experts import expert_mlp
from moe_jax.ops.route import gate_logits, hash_table, scores, top_k_route, weigh
from moe_jax.precision import Policy
from moe_jax.routing import Balance, Gate, Idea, Sizes

# B batch  S sequence  D model  E experts  F expert width  K experts a token


class MoE(nn.Module):
  """Routed plus shared experts. Source: arXiv:2401.06066, 3; arXiv:2412.19437, 2.1.2.

  With `hashed`, a frozen table chooses a token's experts by its id, and the gate only weighs them;
  such a layer has neither a selection bias nor balancing ideas. Source: arXiv:2606.19348.
  """

  cfg: MoEConfig
  balance: Balance
  std: float
  policy: Policy
  vocab_size: int = 0  # for tables by token id
  hashed: bool = False

  @nn.compact
  def __call__(self, x_BSD: jax.Array, where: Where) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the output and what was seen, by name (see `_seen`).

    Padding is routed like any token but counted nowhere.
    """
    c, D, E, F = self.cfg, x_BSD.shape[-1], self.cfg.num_experts, self.cfg.d_expert
    balance = Balance() if self.hashed else self.balance
    router_DE = weight(self, 'router_DE', (D, E), sh.MATRIX_DX, std=self.std)
    gate_up_ED2F = matrix(self, 'gate_up_ED2F', (E, D, 2, F), sh.EXPERTS_ED2F, std=self.std)
    down_EFD = matrix(self, 'down_EFD', (E, F, D), sh.EXPERTS_EFD, std=self.std)
    states = {idea.name: self._carried(idea, D) for idea in balance.carriers}

    router_DE = jax.sharding.reshard(router_DE, sh.gathered(sh.MATRIX_DX))
    logits_BSE = gate_logits(x_BSD, router_DE)
    logits_BSE = checkpoint_name(logits_BSE, 'router_logits')
    gate = Gate(
      logits_BSE=logits_BSE,
      score_BSE=scores(logits_BSE, c.score),
      valid_BS=where.segment_BS > 0,
      token_BS=where.token_BS,
      bias_E=self._bias(),
      router_DE=router_DE,
      top_k=c.top_k,
    )
    expert_BSK, weight_BSK = self._choose(gate, balance, states)
    gate = gate._replace(expert_BSK=expert_BSK)
    kept_BSK = balance.limit(gate, states) if balance.drops else expert_BSK
    if balance.drops:
      weight_BSK = jnp.where(kept_BSK < E, weight_BSK, 0)

    experts = tuple(self.policy.cast(m.value) for m in (gate_up_ED2F, down_EFD))
    options: Any = dict(
      swiglu_limit=c.swiglu_limit,
      recipe=self.policy.experts,
      ready=(gate_up_ED2F.ready, down_EFD.ready),
      travel=self.policy.dispatch,
    )
    if balance.reads_outputs:
      # of dropped choices too, whose weight is 0: averages are to be of all that chose an expert
      output_BSKD = self._each_output(x_BSD, expert_BSK, experts, options)
      gate = gate._replace(output_BSKD=output_BSKD)
      y_BSD = jnp.einsum('bskd,bsk->bsd', output_BSKD.astype(jnp.float32), weight_BSK)
      y_BSD = y_BSD.astype(x_BSD.dtype)
    else:
      y_BSD = expert_mlp(x_BSD, kept_BSK, weight_BSK, *experts, **options)
    for filled_BSD in balance.fill(gate, states):
      y_BSD += filled_BSD.astype(y_BSD.dtype)
    if c.num_shared:
      shared = FeedForward(c.num_shared * F, self.std, self.policy, c.swiglu_limit, name='shared')
      y_BSD += shared(x_BSD)

    sums = balance.measure(gate, states)
    whole = sums
    if self.has_variable('counts', 'sums'):  # of the whole batch, where this is a part of it
      whole = sums | self.get_variable('counts', 'sums')
    aux = _seen(gate, kept_BSK) | sums
    aux['balance_loss'] = balance.loss(gate, states, whole)
    if not balance.training:
      aux |= _studied(gate)
    return y_BSD, aux

  def _bias(self) -> Any:
    E = self.cfg.num_experts
    if self.hashed:
      return jnp.zeros(E)
    make = lambda: jnp.zeros((E,), jnp.float32, out_sharding=sh.VECTOR)
    return self.variable('router', 'bias_E', make).value

  def _carried(self, idea: Idea, d_model: int) -> Any:
    c = self.cfg
    sizes = Sizes(c.num_experts, c.top_k, d_model, self.vocab_size)
    # a stream of its own: the weights of a seed are the same under every idea
    make = lambda: idea.init(self.make_rng('ideas'), sizes)
    return self.variable('ideas', idea.name, make).value

  def _choose(self, gate: Gate, balance: Balance, states: Any) -> tuple[jax.Array, jax.Array]:
    c, weight_BSK = self.cfg, None
    if self.hashed:
      expert_BSK = self._hashed(gate)
    elif balance.chooser:
      chooser = balance.chooser
      expert_BSK, weight_BSK = chooser.choose(gate, states.get(chooser.name, {}))
    else:
      return top_k_route(
        gate.score_BSE,
        gate.bias_E,
        k=c.top_k,
        num_groups=c.num_groups,
        top_groups=c.top_groups,
        group_score=c.group_score,
        normalize=c.normalize_weights,
        scale=c.weight_scale,
      )
    if weight_BSK is None:
      # the expert past the last, which is none, weighs nothing
      score_BSE = jnp.pad(gate.score_BSE, ((0, 0), (0, 0), (0, 1)))
      weight_BSK = weigh(score_BSE, expert_BSK, normalize=c.normalize_weights, scale=c.weight_scale)
    return expert_BSK, weight_BSK

  def _hashed(self, gate: Gate) -> jax.Array:
    c = self.cfg

    def make() -> jax.Array:
      key = self.make_rng('params')
      return hash_table(key, num_ids=self.vocab_size, top_k=c.top_k, num_experts=c.num_experts)

    table_VK: Any = self.variable('router', 'expert_VK', make).value
    return table_VK.at[gate.token_BS].get(out_sharding=sh.STREAM)

  def _each_output(
    self, x_BSD: jax.Array, expert_BSK: jax.Array, experts: Any, options: Any
  ) -> jax.Array:
    """What each chosen expert makes of its token, [B, S, K, D]: a choice is a token of its own."""
    B, S, K = expert_BSK.shape
    x_BTD = jnp.repeat(x_BSD, K, axis=1, total_repeat_length=S * K)
    expert_BT1 = expert_BSK.reshape(B, S * K, 1)
    ones_BT1 = jnp.ones_like(expert_BT1, jnp.float32)
    y_BTD = expert_mlp(x_BTD, expert_BT1, ones_BT1, *experts, **options)
    return y_BTD.reshape(B, S, K, -1)


def _seen(gate: Gate, kept_BSK: jax.Array) -> dict[str, jax.Array]:
  """Sums over valid tokens, float32.

  `load_E` tokens that chose each expert; `tokens`; `entropy` of the gate's softmax over its
  maximum; `margin` between the worst chosen and the best other expert, bias included (below 0 where
  something else than the score chose); `choices` that went to an expert, and of these `dropped`.
  """
  E = gate.num_experts
  total = lambda value_BS: jnp.where(gate.valid_BS, value_BS, 0).astype(jnp.float32).sum()
  p_BSE = jax.nn.softmax(gate.logits_BSE, axis=-1)
  entropy_BS = -jax.scipy.special.xlogy(p_BSE, p_BSE).sum(-1) / jnp.log(E)
  chosen_BSE, choice_BSE = gate.selected_BSE > 0, gate.score_BSE + gate.bias_E
  worst_BS = jnp.where(chosen_BSE, choice_BSE, jnp.inf).min(-1)
  best_BS = jnp.where(chosen_BSE, -jnp.inf, choice_BSE).max(-1)
  margin_BS = jnp.where(jnp.isfinite(worst_BS - best_BS), worst_BS - best_BS, 0)
  choices = total((gate.expert_BSK < E).sum(-1))
  seen = {
    'load_E': gate.load_E,
    'tokens': total(jnp.ones_like(entropy_BS)),
    'entropy': total(entropy_BS),
    'margin': total(margin_BS),
    'choices': choices,
    'dropped': choices - total((kept_BSK < E).sum(-1)),
  }
  return jax.tree.map(jax.lax.stop_gradient, seen)


def _studied(gate: Gate) -> dict[str, jax.Array]:
  """What evaluation keeps: `load_BE` of every row, the `chosen_BSK`, and how many tokens chose both
  experts of a pair, `pairs_EE`."""
  selected_BSE = jnp.where(gate.valid_BS[..., None], gate.selected_BSE, 0)
  pairs_EE = jnp.einsum('bse,bsf->ef', selected_BSE, selected_BSE, out_sharding=jax.P(None, None))
  return {'load_BE': selected_BSE.sum(1), 'chosen_BSK': gate.expert_BSK, 'pairs_EE': pairs_EE}
