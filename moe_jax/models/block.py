"""One decoder layer."""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import LayerKind, ModelConfig
from moe_jax.models.attention import KINDS, Where
from moe_jax.models.layers import FeedForward, RMSNorm
from moe_jax.models.moe import MoE
from moe_jax.models.probes import Probe
from moe_jax.models.residual import RESIDUALS
from moe_jax.precision import Policy
from moe_jax.routing import Balance

# B batch  S sequence  J streams  D model


class Block(nn.Module):
  """Attention, then a feed-forward; each reads its normed input from the residual stream and
  writes back to it: with a plain residual, x + attention(norm(x)), x + feed_forward(norm(x)).
  """

  kind: LayerKind
  cfg: ModelConfig
  balance: Balance
  policy: Policy

  @nn.compact
  def __call__(self, x: jax.Array, where: Where, cache: Any):
    """`x` is the residual stream [B, S, D], or [B, S, J, D] of several."""
    c, std = self.cfg, self.cfg.init_std
    site = RESIDUALS[c.residual].site
    h_BSD, write = site(c, name='attention_residual')(x)
    attention = KINDS[self.kind.attention](
      c.attention_config(self.kind.attention), c.rope, std, c.norm_eps, self.policy,
      name='attention',
    )  # fmt: skip
    probe = lambda site, a: Probe(self.policy, name=f'probe_{site}')(a)
    h_BSD = probe('attention_in', RMSNorm(c.norm_eps, name='attention_norm')(h_BSD))
    y_BSD, cache, aux = attention(h_BSD, where, cache)
    x = checkpoint_name(write(probe('attention_out', y_BSD)), 'stream')

    h_BSD, write = site(c, name='feed_forward_residual')(x)
    h_BSD = probe('feed_forward_in', RMSNorm(c.norm_eps, name='feed_forward_norm')(h_BSD))
    if self.kind.feed_forward == 'dense':
      y_BSD = FeedForward(c.d_ff, std, self.policy, name='dense')(h_BSD)
    else:
      hashed = self.kind.feed_forward == 'moe_hash'
      moe = MoE(c.moe, self.balance, std, self.policy, c.vocab_size, hashed, name='moe')
      y_BSD, seen = moe(h_BSD, where)
      aux |= seen
    return write(probe('feed_forward_out', y_BSD)), cache, aux
