"""One decoder layer."""

from typing import Any

import flax.linen as nn
import jax

from moe_jax.config import LayerKind, ModelConfig
from moe_jax.models.attention import KINDS, Where
from moe_jax.models.layers import FeedForward, RMSNorm
from moe_jax.models.moe import MoE
from moe_jax.precision import Policy
from moe_jax.routing import Idea

# B batch  S sequence  D model


class Block(nn.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x))."""

  kind: LayerKind
  cfg: ModelConfig
  balance: tuple[Idea, ...]
  policy: Policy

  @nn.compact
  def __call__(self, x_BSD: jax.Array, where: Where, cache: Any):
    c, std = self.cfg, self.cfg.init_std
    attention = KINDS[self.kind.attention](
      getattr(c, self.kind.attention), c.rope, std, c.norm_eps, self.policy, name='attention'
    )
    y_BSD, cache, aux = attention(RMSNorm(c.norm_eps, name='attention_norm')(x_BSD), where, cache)
    x_BSD += y_BSD
    h_BSD = RMSNorm(c.norm_eps, name='feed_forward_norm')(x_BSD)
    if self.kind.feed_forward == 'moe':
      moe = MoE(c.moe, self.balance, std, self.policy, name='moe')
      y_BSD, seen = moe(h_BSD, where)
      aux |= seen
    else:
      y_BSD = FeedForward(c.d_ff, std, self.policy, name='dense')(h_BSD)
    return x_BSD + y_BSD, cache, aux
