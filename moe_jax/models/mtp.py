"""DeepSeek-V3's multi-token prediction: modules behind the decoder, each looking one token further.

Module k reads, at position i, what the one before left there (module 1: the decoder's output after
its final norm) and the embedding of token i + k; through one more layer and the shared output head
it predicts token i + k + 1. Training adds its loss to the model's, and its gradients reach the
whole decoder; decoding may use it as a draft (moe_jax.infer.speculative) or leave it out.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.config import LayerKind, ModelConfig
from moe_jax.models.attention import Where
from moe_jax.models.block import Block
from moe_jax.models.layers import RMSNorm, matmul, weight
from moe_jax.models.residual import RESIDUALS
from moe_jax.precision import Policy
from moe_jax.routing import Balance

# B batch  S sequence  J streams  D model  X twice D, or D again


class MTPOutput(NamedTuple):
  state: jax.Array  # what the next module reads
  hidden_BSD: jax.Array  # after the module's own norm, for the output head
  cache: Any
  aux: dict[str, jax.Array]


class MTP(nn.Module):
  """One module: join the next embedding and what came before, a layer, a norm.

  V3: the join is one matrix on [norm(embedding) ; norm(previous)], in the order of the checkpoints'
  `eh_proj`; the paper writes the halves the other way round. `previous` is a hidden state after the
  norm of where it comes from, as transformers has it. Source: arXiv:2412.19437, section 2.2.

  V4 (several residual streams): `previous` are the streams themselves, each joined with the same
  embedding by two matrices, and the layer sees only its window. Source: arXiv:2606.19348.
  """

  cfg: ModelConfig
  balance: Balance
  policy: Policy

  @nn.compact
  def __call__(
    self, previous: jax.Array, embedded_BSD: jax.Array, where: Where, cache: Any
  ) -> MTPOutput:
    """Args: `embedded_BSD` and `where` of the tokens k places on, see `look_ahead`."""
    c, D = self.cfg, self.cfg.d_model
    embedded_BSD = RMSNorm(c.norm_eps, name='embedding_norm')(embedded_BSD)
    previous = RMSNorm(c.norm_eps, name='previous_norm')(previous)
    matrix = lambda name, shape: weight(self, name, shape, sh.MATRIX_DX, std=c.init_std)
    times = functools.partial(matmul, spec=sh.MATRIX_DX, policy=self.policy)
    if c.residual == 'plain':
      x_BSX = jnp.concatenate([embedded_BSD, previous], axis=-1)
      x = times('bsx,xd->bsd', x_BSX, matrix('join_XD', (2 * D, D)))
    else:
      x = times('bsjd,dx->bsjx', previous, matrix('previous_DX', (D, D)))
      x += times('bsd,dx->bsx', embedded_BSD, matrix('embedded_DX', (D, D)))[:, :, None]
    x, cache, aux = Block(layer(c), c, self.balance, self.policy, name='block')(x, where, cache)
    x_BSD = RESIDUALS[c.residual].leave(c, name='leave')(x)
    hidden_BSD = RMSNorm(c.norm_eps, name='final_norm')(x_BSD)
    return MTPOutput(state_of(c, hidden_BSD, x), hidden_BSD, cache, aux)


def layer(cfg: ModelConfig) -> LayerKind:
  """The kind of a module's layer: the last one's; in V4 always sliding, routed by scores."""
  return cfg.layers[-1] if cfg.residual == 'plain' else LayerKind('sliding', 'moe')


def state_of(cfg: ModelConfig, hidden_BSD: jax.Array, x: jax.Array) -> jax.Array:
  """What the module behind reads of a stack that left `x` and, from it, `hidden_BSD`."""
  return hidden_BSD if cfg.residual == 'plain' else x


def names(cfg: ModelConfig) -> list[str]:
  """The modules' names among the variables, from the nearest token to the furthest."""
  return [f'mtp_{k}' for k in range(1, cfg.mtp.num_modules + 1)]


def shift(a_BSX: jax.Array, k: int) -> jax.Array:
  """[B, S, ...] -> the same shape, place i holding what stood at i + k, the last k places zero."""
  S = a_BSX.shape[1]
  k = min(k, S)
  return jnp.pad(a_BSX[:, k:], [(0, 0), (0, k)] + [(0, 0)] * (a_BSX.ndim - 2))


def same_document(segment_BS: jax.Array, k: int) -> jax.Array:
  """Whether place i + k is in the row and in the document of place i; false on padding."""
  return (segment_BS > 0) & (shift(segment_BS, k) == segment_BS)


def look_ahead(where: Where, k: int) -> Where:
  """The tokens k places on, standing where they are read; places without one become padding.

  A document's last k places see tokens of the next document or none. Only they do, and no place
  that has a target sees them, since attention looks back.
  """
  segment_BS = jnp.where(same_document(where.segment_BS, k), where.segment_BS, 0)
  return where._replace(token_BS=shift(where.token_BS, k), segment_BS=segment_BS)


def targets(batch: dict[str, jax.Array], k: int) -> tuple[jax.Array, jax.Array]:
  """What module k predicts at each place, and where that counts: inside the place's document."""
  inside_BS = same_document(batch['segments'], k)
  return shift(batch['targets'], k), inside_BS & shift(batch['loss_mask'], k)
