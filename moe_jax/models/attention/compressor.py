"""From tokens to compressed entries, and the cache of both."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding as sh
from moe_jax.models.attention.base import Cache, Where
from moe_jax.models.layers import RMSNorm, matmul, weight
from moe_jax.ops.compress import Windows, closed_windows, compress
from moe_jax.ops.rope import rotate_last
from moe_jax.precision import Policy

# B batch  S new tokens  T tail and new tokens  D model  C entry width  X projected width
# M tokens an entry  N entries


class Entries(NamedTuple):
  """Compressed entries and where they stand, as `ops.sink_attention.entries_visible` has it."""

  entry_BNC: jax.Array
  end_BN: jax.Array  # index in the row of the last token of each window
  segment_BN: jax.Array  # its document, 0 where there is no entry


class Compressor(nn.Module):
  """An entry for every `ratio` tokens of a document. Source: arXiv:2606.19348, section 2.2.

  While decoding, the cache holds the entries made so far and, of the newest tokens, the projections
  that later entries may need: `ratio - 1`, and `ratio` more with overlap.
  """

  width: int
  ratio: int
  overlap: bool
  std: float
  eps: float
  policy: Policy

  @nn.compact
  def __call__(
    self, x_BSD: jax.Array, where: Where, cache: Cache | None, *, freq: np.ndarray
  ) -> tuple[Entries, Cache | None]:
    (_, S, D), M = x_BSD.shape, self.ratio
    X = self.width * (2 if self.overlap else 1)
    content_BTX, gate_BTX = (
      matmul(
        'bsd,dx->bsx',
        x_BSD,
        weight(self, f'{name}_DX', (D, X), sh.MATRIX_DX, std=self.std),
        sh.MATRIX_DX,
        policy=self.policy,
      )
      for name in ('content', 'gate')
    )
    bias_MX = self.param('bias_MX', _zeros, (M, X))
    position_BT, segment_BT, tail = where.position_BS, where.segment_BS, 0
    if cache is not None:
      tail = cache['content_BTX'].shape[1]
      content_BTX, gate_BTX = (
        jnp.concatenate([cache[name].astype(new.dtype), new], axis=1)
        for name, new in (('content_BTX', content_BTX), ('gate_BTX', gate_BTX))
      )
      position_BT = where.start_B[:, None] - tail + jnp.arange(tail + S)
      segment_BT = (position_BT >= 0).astype(jnp.int32)
    windows = closed_windows(position_BT, segment_BT, ratio=M, num_entries=-(-S // M), first=tail)
    entry_BNC = compress(content_BTX, gate_BTX, bias_MX, windows, overlap=self.overlap)
    entry_BNC = RMSNorm(self.eps, name='norm')(entry_BNC)
    begin_BN = windows.position_BN - M + 1
    entry_BNC = rotate_last(entry_BNC[:, :, None], begin_BN, freq)[:, :, 0]
    if cache is None:
      return Entries(entry_BNC, windows.end_BN, windows.segment_BN), None

    entries = _insert(cache['entry_BNC'], entry_BNC, windows, ratio=M)
    cache = {
      'entry_BNC': entries,
      'content_BTX': content_BTX[:, S:].astype(cache['content_BTX'].dtype),
      'gate_BTX': gate_BTX[:, S:].astype(cache['gate_BTX'].dtype),
    }
    # what is not filled yet ends after every query, which hides it
    N = entries.shape[1]
    end_BN = jnp.broadcast_to(jnp.arange(N) * M + M - 1, entries.shape[:2], out_sharding=sh.TOKENS)
    return Entries(entries.astype(x_BSD.dtype), end_BN, jnp.ones_like(end_BN)), cache

  @staticmethod
  def empty_cache(
    batch: int, length: int, dtype: Any, *, width: int, ratio: int, overlap: bool
  ) -> Cache:
    """Room for the entries of `length` tokens."""
    X, T = (2 * width, 2 * ratio - 1) if overlap else (width, ratio - 1)
    shapes = {
      'entry_BNC': (batch, max(1, length // ratio), width),
      'content_BTX': (batch, T, X),
      'gate_BTX': (batch, T, X),
    }
    return {n: jnp.zeros(shape, dtype, out_sharding=sh.STREAM) for n, shape in shapes.items()}


def _zeros(_: Any, shape: tuple[int, ...]) -> jax.Array:
  return jnp.zeros(shape, jnp.float32, out_sharding=jax.P(None, None))


def _insert(
  cached_BNC: jax.Array, new_BNC: jax.Array, windows: Windows, *, ratio: int
) -> jax.Array:
  """Puts the live new entries into their places."""
  place_BN = jnp.where(windows.live_BN, windows.position_BN // ratio, cached_BNC.shape[1])

  def insert(cached_NC: jax.Array, new_NC: jax.Array, place_N: jax.Array) -> jax.Array:
    return cached_NC.at[place_N].set(new_NC.astype(cached_NC.dtype), mode='drop')

  return jax.vmap(insert)(cached_BNC, new_BNC, place_BN)
