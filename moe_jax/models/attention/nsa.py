"""Native sparse attention."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config import NSAConfig
from moe_jax.models.attention.base import Cache, Where, append
from moe_jax.models.attention.grouped import GroupedAttention, empty_heads, span
from moe_jax.models.layers import weight
from moe_jax.ops import nsa
from moe_jax.ops.backends import log_fallback

# B batch  S new tokens  T cached tokens  D model  G key-value heads  M query heads of each
# C key width  V value width  L tokens of a compression block  X hidden width

_BRANCHES = ('compressed', 'selected', 'window')


class NSA(GroupedAttention):
  """Compressed blocks, chosen blocks and a window, each with keys and values of its own.

  Left open by the source and chosen here: the compressing network is linear, silu, linear on a
  block's tokens laid side by side, shared by all heads of a layer; it reads keys that are not
  rotated, and its result is rotated to the position of the block's first token. The gates are a
  sigmoid of one linear map of the stream, for every query head. Documents are compressed and cut
  into blocks separately; see ops.blocks. A query before the end of its document's first compression
  block gets nothing from that branch. Source: arXiv:2502.11089, section 3.
  """

  cfg: NSAConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array, where: Where, cache: Cache | None):
    c, D = self.cfg, x_BSD.shape[-1]
    G, M = c.num_kv_heads, c.num_heads // c.num_kv_heads
    q_BSGMC = self.queries(x_BSD, where)
    gate_BSGM3 = jax.nn.sigmoid(self.by_group('gate_DGM3', x_BSD, (G, M, len(_BRANCHES))))
    entries = {}
    for branch in _BRANCHES:
      k_BSGC = self.keys(f'{branch}_k_DGC', x_BSD, c.d_head)
      if branch != 'compressed':
        k_BSGC = self.rotate(k_BSGC, where.position_BS)
      entries |= {
        f'{branch}_k_BTGC': k_BSGC,
        f'{branch}_v_BTGV': self.keys(f'{branch}_v_DGV', x_BSD, c.d_value),
      }
    if cache is None:
      problem = nsa.unsupported(q_BSGMC, c.d_value, self._sizes)
      if problem is None:
        return self.output(self._rows(q_BSGMC, entries, gate_BSGM3, where), D), None, {}
      log_fallback('nsa', 'kernels', 'masks over all pairs', problem)
    else:
      cache = append(cache, entries, where.start_B)
      entries = {name: a.astype(x_BSD.dtype) for name, a in cache.items()}
    at = span(where, cache)
    compressed, selected, window = (
      nsa.KeyValue(entries[f'{b}_k_BTGC'], entries[f'{b}_v_BTGV']) for b in _BRANCHES
    )
    first_BT = jnp.maximum(at.k_position_BT - (c.compress_length - 1), 0)
    compressed = nsa.KeyValue(
      self.rotate(self._compress('k', compressed.k_BTGC), first_BT),
      self._compress('v', compressed.v_BTGV),
    )
    o_BSGMV = nsa.attention(
      q_BSGMC,
      compressed,
      selected,
      window,
      gate_BSGM3,
      at,
      sizes=self._sizes,
      scale=self.scale,
    )
    return self.output(o_BSGMV, D), cache, {}

  @property
  def _sizes(self) -> nsa.Sizes:
    c = self.cfg
    return nsa.Sizes(c.compress_length, c.compress_stride, c.select_length, c.top_blocks, c.window)

  def _rows(
    self, q_BSGMC: jax.Array, entries: dict[str, jax.Array], gate_BSGM3: jax.Array, where: Where
  ) -> jax.Array:
    """Whole rows by kernels, which compress a block once instead of at each of its tokens."""
    at, length = (where.position_BS, where.segment_BS), self.cfg.compress_length
    end_BN, position_BN = nsa.closed_blocks(*at, self._sizes)
    k_BNGC, v_BNGV = (
      self._compress(name, nsa.block_tokens(x_BSGC, end_BN, length), nsa.compress_blocks)
      for name, x_BSGC in (('k', entries['compressed_k_BTGC']), ('v', entries['compressed_v_BTGV']))
    )
    compressed = nsa.KeyValue(
      self.rotate(k_BNGC, jnp.maximum(position_BN - (length - 1), 0)), v_BNGV
    )
    selected, window = (
      nsa.KeyValue(entries[f'{b}_k_BTGC'], entries[f'{b}_v_BTGV']) for b in _BRANCHES[1:]
    )
    return nsa.rows_attention(
      q_BSGMC, compressed, selected, window, gate_BSGM3, *at, sizes=self._sizes, scale=self.scale
    )

  def _compress(
    self, name: str, x_BTGC: jax.Array, network: Callable[..., jax.Array] = nsa.compress
  ) -> jax.Array:
    L, C, X = self.cfg.compress_length, x_BTGC.shape[-1], self.cfg.d_compress
    # small, and so held whole on every device
    whole = lambda dims, shape: self.policy.cast(
      weight(self, f'{name}_{dims}', shape, jax.P(*(None for _ in shape)), std=self.std)
    )
    place_LC, up_LCX, down_XC = (
      whole('place_LC', (L, C)),
      whole('up_LCX', (L, C, X)),
      whole('down_XC', (X, C)),
    )
    return network(x_BTGC, place_LC, up_LCX, down_XC)

  @staticmethod
  def empty_cache(cfg: NSAConfig, batch: int, length: int, dtype: Any) -> Cache:
    """Raw keys and values of all three branches; compressed again at every call.

    Less would do: the last tokens for the window and for the compression block under way, and the
    compressed keys and values of whole blocks.
    """
    widths = {}
    for branch in _BRANCHES:
      widths |= {f'{branch}_k_BTGC': cfg.d_head, f'{branch}_v_BTGV': cfg.d_value}
    return empty_heads(widths, cfg.num_kv_heads, batch, length, dtype)
