"""The definition of V4's compressor: a softmax over the tokens of a window, channel by channel.

A document's first M tokens are its first window, the next M its second, and so on; what is left
over at its end has no entry. Windows never cross a document's border.

Source: arXiv:2606.19348, section 2.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# B batch  T tokens  N entries  M tokens a window  C entry width  X projected width (C or 2C)


class Windows(NamedTuple):
  """Where windows end, in the order of the row; places beyond the last one are not `live`."""

  end_BN: Int[Array, 'B N']  # index in the row of a window's last token
  position_BN: Int[Array, 'B N']  # that token's position in its document
  segment_BN: Int[Array, 'B N']  # its document, 0 where not live
  live_BN: Bool[Array, 'B N']


def closed_windows(
  position_BT: Int[Array, 'B T'],
  segment_BT: Int[Array, 'B T'],
  *,
  ratio: int,
  num_entries: int,
  first: int = 0,
) -> Windows:
  """Finds the windows of `ratio` tokens that close at index `first` or later.

  Args:
    segment_BT: document numbers, 0 for padding, which has no windows.
    num_entries: N, at least as many as can close: (T - first) / ratio, rounded up.
  """
  T = position_BT.shape[1]
  closes_BT = ((position_BT + 1) % ratio == 0) & (segment_BT > 0) & (jnp.arange(T) >= first)
  # stable: those that close come first, in order
  end_BN = jnp.argsort(~closes_BT, axis=1, stable=True)[:, :num_entries]
  position_BN, segment_BN, live_BN = (
    jnp.take_along_axis(a, end_BN, axis=1) for a in (position_BT, segment_BT, closes_BT)
  )
  return Windows(end_BN, position_BN, jnp.where(live_BN, segment_BN, 0), live_BN)


def _rows(a_BTX: Array, end_BN: Array, ratio: int) -> Array:
  """The `ratio` rows up to and with each end, [B, N, M, X]; rows before the first repeat it."""
  B, N = end_BN.shape
  index_BNM = jnp.maximum(end_BN[..., None] - ratio + 1 + jnp.arange(ratio), 0)
  rows = jnp.take_along_axis(a_BTX, index_BNM.reshape(B, N * ratio, 1), axis=1)
  return rows.reshape(B, N, ratio, -1)


def compress(
  content_BTX: Float[Array, 'B T X'],
  gate_BTX: Float[Array, 'B T X'],
  bias_MX: Float[Array, 'M X'],
  windows: Windows,
  *,
  overlap: bool,
) -> Float[Array, 'B N C']:
  """sum over a window's tokens of softmax(gate + bias) * content, for each channel by itself.

  With `overlap`, X = 2C: an entry's softmax runs over 2M tokens, the first C channels of the window
  before (absent before a document's first) and the last C channels of its own.

  Float32 inside, content's dtype out. Entries of windows that are not live hold anything finite.
  """
  M = bias_MX.shape[0]
  dtype = content_BTX.dtype
  content_BTX, gate_BTX = content_BTX.astype(jnp.float32), gate_BTX.astype(jnp.float32)
  content_BNMX = _rows(content_BTX, windows.end_BN, M)
  gate_BNMX = _rows(gate_BTX, windows.end_BN, M) + bias_MX
  if overlap:
    C = content_BTX.shape[-1] // 2
    absent_BN11 = (windows.position_BN < 2 * M - 1)[..., None, None]
    before_BN = windows.end_BN - M
    content_BNMC = _rows(content_BTX[..., :C], before_BN, M)
    gate_BNMC = _rows(gate_BTX[..., :C], before_BN, M) + bias_MX[:, :C]
    gate_BNMC = jnp.where(absent_BN11, -jnp.inf, gate_BNMC)
    content_BNMX = jnp.concatenate([content_BNMC, content_BNMX[..., C:]], axis=2)
    gate_BNMX = jnp.concatenate([gate_BNMC, gate_BNMX[..., C:]], axis=2)
  weight_BNMX = jax.nn.softmax(gate_BNMX, axis=2)
  return (weight_BNMX * content_BNMX).sum(2).astype(dtype)
