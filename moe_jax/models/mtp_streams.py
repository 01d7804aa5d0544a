"""DeepSeek-V4's multi-token prediction: one more layer, on the residual streams.

What DeepSeek-V3's module is to a plain residual (arXiv:2412.19437, section 2.2) with its projection
written as two matrices; the streams go in as they are, before they are read for the output head.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from moe_jax import sharding as sh
from moe_jax.config import LayerKind, ModelConfig
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Block
from moe_jax.models.layers import RMSNorm, matmul, weight
from moe_jax.models.residual import RESIDUALS
from moe_jax.precision import Policy
from moe_jax.routing import Idea

# B batch  S sequence  D model  J streams

KIND = LayerKind('sliding', 'moe')


class StreamMTPOutput(NamedTuple):
  hidden_BSD: jax.Array  # after the module's own norm, for the output head
  x_BSJD: jax.Array  # the streams, for the next module
  cache: Any
  aux: dict[str, jax.Array]


class StreamMTP(nn.Module):
  """x_j = P norm(embedding) + Q norm(x_j) for every stream j, a layer, a reading head, a norm.

  Source: arXiv:2606.19348, section 2.4, and the released code.
  """

  cfg: ModelConfig
  balance: tuple[Idea, ...]
  policy: Policy

  @nn.compact
  def __call__(
    self, x_BSJD: jax.Array, embedded_BSD: jax.Array, where: Where, cache: Any
  ) -> StreamMTPOutput:
    """Args: `embedded_BSD` and `where` of the next tokens, standing where they are read."""
    c, D = self.cfg, self.cfg.d_model
    embedding_DD, stream_DD = (
      weight(self, name, (D, D), sh.MATRIX_DX, std=c.init_std)
      for name in ('embedding_DD', 'stream_DD')
    )
    e_BSD = RMSNorm(c.norm_eps, name='embedding_norm')(embedded_BSD)
    e_BSD = matmul('bsd,de->bse', e_BSD, embedding_DD, sh.MATRIX_DX, policy=self.policy)
    x_BSJD = RMSNorm(c.norm_eps, name='stream_norm')(x_BSJD)
    x_BSJD = matmul('bsjd,de->bsje', x_BSJD, stream_DD, sh.MATRIX_DX, policy=self.policy)
    x_BSJD += e_BSD[:, :, None]
    block = Block(KIND, c, self.balance, self.policy, name='block')
    x_BSJD, cache, aux = block(x_BSJD, where, cache)
    h_BSD = RESIDUALS[c.residual].leave(c, name='leave')(x_BSJD)
    hidden_BSD = RMSNorm(c.norm_eps, name='final_norm')(h_BSD)
    return StreamMTPOutput(hidden_BSD, x_BSJD, cache, aux)
