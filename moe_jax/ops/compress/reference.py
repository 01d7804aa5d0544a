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

  def row(position_T: Array, segment_T: Array) -> Windows:
    T = len(position_T)
    closes_T = ((position_T + 1) % ratio == 0) & (segment_T > 0) & (jnp.arange(T) >= first)
    end_N = jnp.nonzero(closes_T, size=num_entries, fill_value=T - 1)[0]
    live_N = jnp.arange(num_entries) < closes_T.sum()
    return Windows(end_N, position_T[end_N], jnp.where(live_N, segment_T[end_N], 0), live_N)

  return jax.vmap(row)(position_BT, segment_BT)


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

  def row(content_TX: Array, gate_TX: Array, end_N: Array, position_N: Array) -> Array:
    own_NM = jnp.maximum(end_N[:, None] - M + 1 + jnp.arange(M), 0)
    content_NMC, gate_NMC = content_TX[own_NM], gate_TX[own_NM] + bias_MX
    if overlap:
      C = content_TX.shape[-1] // 2
      before_NM = jnp.maximum(own_NM - M, 0)
      absent_N11 = (position_N < 2 * M - 1)[:, None, None]
      gate_before_NMC = jnp.where(absent_N11, -jnp.inf, gate_TX[before_NM, :C] + bias_MX[:, :C])
      content_NMC = jnp.concatenate([content_TX[before_NM, :C], content_NMC[..., C:]], axis=1)
      gate_NMC = jnp.concatenate([gate_before_NMC, gate_NMC[..., C:]], axis=1)
    return (jax.nn.softmax(gate_NMC, axis=1) * content_NMC).sum(1)

  content32_BTX, gate_BTX = content_BTX.astype(jnp.float32), gate_BTX.astype(jnp.float32)
  entry_BNC = jax.vmap(row)(content32_BTX, gate_BTX, windows.end_BN, windows.position_BN)
  return entry_BNC.astype(content_BTX.dtype)
