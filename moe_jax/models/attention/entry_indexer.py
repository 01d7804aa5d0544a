"""The indexer of compressed sparse attention: which entries a query will read."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding as sh
from moe_jax.config import CompressedConfig
from moe_jax.models.attention.base import Cache, Where
from moe_jax.models.attention.compressor import Compressor
from moe_jax.models.layers import matmul, weight
from moe_jax.ops.rope import rotate_last
from moe_jax.precision import Policy

# B batch  S sequence  N entries  D model  Q query latent width  H indexer heads  C indexer width


class Scored(NamedTuple):
  """What `ops.entry_index` scores entries from: those of other documents and later ones too."""

  q_BSHC: jax.Array
  entry_BNC: jax.Array
  weight_BSH: jax.Array


class EntryIndexer(nn.Module):
  """Scores every entry for every query, by small heads and small entries of its own.

  Source: arXiv:2606.19348, section 2.2, with the two constants of the released code that the report
  leaves out: they do not change the choice, they do change the training loss.
  """

  cfg: CompressedConfig
  std: float
  eps: float
  policy: Policy

  @nn.compact
  def __call__(
    self,
    x_BSD: jax.Array,
    latent_BSQ: jax.Array,
    where: Where,
    cache: Cache | None,
    *,
    freq: np.ndarray,
  ) -> tuple[Scored, Cache | None]:
    c, D, Q = self.cfg, x_BSD.shape[-1], latent_BSQ.shape[-1]
    q_QHC = weight(self, 'q_QHC', (Q, c.num_index_heads, c.d_index), sh.HEADS_DHC, std=self.std)
    weight_DH = weight(self, 'weight_DH', (D, c.num_index_heads), sh.MATRIX_DF, std=self.std)
    q_BSHC = matmul('bsq,qhc->bshc', latent_BSQ, q_QHC, sh.HEADS_DHC, policy=self.policy)
    q_BSHC = rotate_last(q_BSHC, where.position_BS, freq)
    # float32 under every policy, as the gate: rounding here changes which entries are seen
    weight_DH = jax.sharding.reshard(weight_DH, sh.gathered(sh.MATRIX_DF))
    weight_BSH = jnp.einsum(
      'bsd,dh->bsh', x_BSD.astype(jnp.float32), weight_DH, precision='highest'
    )
    compressor = Compressor(
      c.d_index, c.csa_ratio, True, self.std, self.eps, self.policy, name='compressor'
    )
    entries, cache = compressor(x_BSD, where, cache, freq=freq)
    return Scored(q_BSHC, entries.entry_BNC, weight_BSH), cache
