"""DeepSeek-V4's attention kinds: a sliding window, alone or with compressed entries behind it."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding as sh
from moe_jax.config import CompressedConfig, RopeConfig
from moe_jax.models.attention.base import Aux, Cache, Where, rope_frequencies, spread
from moe_jax.models.attention.compressed_cache import attend_caches
from moe_jax.models.attention.compressor import Compressor
from moe_jax.models.attention.entry_indexer import EntryIndexer
from moe_jax.models.layers import RMSNorm, matmul, matrix
from moe_jax.ops.backends import log_fallback
from moe_jax.ops.entry_index import (
  choose,
  chosen_scores,
  entry_scores,
  index_loss,
  select_top_k,
)
from moe_jax.ops.norm import unit_rms
from moe_jax.ops.rope import rotate_last
from moe_jax.ops.sink_attention import (
  SLOT_BLOCK,
  Spans,
  chosen_mass,
  compressed_attention,
  entries_visible,
  sink_attention,
  spans,
  unsupported,
  window_visible,
)
from moe_jax.precision import Policy

# B batch  S new tokens  W window  T window and new tokens  N entries  D model  Q query latent width
# H heads  C head width  G groups of heads  X width of a group  R rank of its projection


class Branch(NamedTuple):
  """Compressed entries beside the window, and what they leave behind."""

  entry_BNC: jax.Array
  visible_BSN: jax.Array
  cache: Cache  # empty without a cache
  aux: Callable[[jax.Array], Aux]  # of the attention [B, S, N] that the entries got
  ratio: int  # tokens an entry
  score_BSN: jax.Array | None = None  # by which a query's entries are chosen; None: it sees all


class Seen(NamedTuple):
  """What compressed entries a fused kernel reads, and what it leaves behind."""

  entry_BNC: jax.Array
  runs: Spans
  index_BSK: jax.Array | None = None  # the chosen ones
  aux: Callable[[jax.Array], Aux] = lambda _: {}  # of the attention's logsumexp


class Sliding(nn.Module):
  """Attention of every head over one key, its value too, of each of the last `window` tokens.

  Keys are turned by their position and therefore so is the output, which is turned back by the
  query's. The output projection goes by groups of heads, through a low rank each.

  Source: arXiv:2606.19348, section 2.2.
  """

  cfg: CompressedConfig
  rope: RopeConfig
  std: float
  eps: float
  policy: Policy

  compressed: ClassVar[bool] = False

  @nn.compact
  def __call__(self, x_BSD: jax.Array, where: Where, cache: Cache | None):
    c, D = self.cfg, x_BSD.shape[-1]
    Q, H, C = c.q_rank, c.num_heads, c.d_head
    where = spread(where)
    freq = rope_frequencies(c.d_rope, c.rope if self.compressed else self.rope)
    sink_H = self.param('sink_H', _zeros, (H,))

    latent_BSQ = self._project('bsd,dq->bsq', x_BSD, 'q_down_DQ', (D, Q), sh.MATRIX_DX)
    latent_BSQ = RMSNorm(self.eps, name='q_norm')(latent_BSQ)
    q_BSHC = self._project('bsq,qhc->bshc', latent_BSQ, 'q_up_QHC', (Q, H, C), sh.HEADS_DHC)
    q_BSHC = rotate_last(unit_rms(q_BSHC, eps=self.eps), where.position_BS, freq)
    kv_BSC = self._project('bsd,dc->bsc', x_BSD, 'kv_DC', (D, C), sh.MATRIX_DX)
    kv_BSC = RMSNorm(self.eps, name='kv_norm')(kv_BSC)
    kv_BSC = rotate_last(kv_BSC[:, :, None], where.position_BS, freq)[:, :, 0]

    fuses = self._fuses(q_BSHC, kv_BSC)
    if cache is None and fuses:
      o_BSHC, aux = self._fused(x_BSD, latent_BSQ, q_BSHC, kv_BSC, sink_H, where, freq)
      return self._out(rotate_last(o_BSHC, -where.position_BS, freq), D), None, aux
    if cache is not None:  # one document a row
      where = where._replace(segment_BS=jnp.ones_like(where.segment_BS))
    key_BTC, visible_BST = _window(kv_BSC, where, cache, window=c.window)
    T = key_BTC.shape[1]
    branch = self._branch(x_BSD, latent_BSQ, where, cache, freq)
    new_cache = None
    if cache is not None:
      kept = key_BTC[:, T - c.window : T].astype(cache['window_BWC'].dtype)
      new_cache = {'window_BWC': kept, **(branch.cache if branch else {})}
    if cache is not None and fuses:
      entry_BNC, ratio, score_BSN = kv_BSC[:, :0], 0, None
      if branch is not None:
        entry_BNC, ratio, score_BSN = branch.entry_BNC, branch.ratio, branch.score_BSN
      o_BSHC = attend_caches(
        q_BSHC,
        key_BTC,
        entry_BNC,
        sink_H,
        _index(where),
        score_BSN,
        window=c.window,
        ratio=ratio,
        k=c.index_top_k,
        scale=C**-0.5,
      )
      return self._out(rotate_last(o_BSHC, -where.position_BS, freq), D), new_cache, {}
    if branch is not None:
      key_BTC = jnp.concatenate([key_BTC, branch.entry_BNC], axis=1)
      visible_BST = jnp.concatenate([visible_BST, branch.visible_BSN], axis=2)
    o_BSHC, mass_BST = sink_attention(q_BSHC, key_BTC, sink_H, visible_BST, scale=C**-0.5)
    y_BSD = self._out(rotate_last(o_BSHC, -where.position_BS, freq), D)
    return y_BSD, new_cache, branch.aux(mass_BST[..., T:]) if branch else {}

  def _branch(
    self,
    x_BSD: jax.Array,
    latent_BSQ: jax.Array,
    where: Where,
    cache: Cache | None,
    freq: np.ndarray,
  ) -> Branch | None:
    del x_BSD, latent_BSQ, where, cache, freq

  def _fuses(self, q_BSHC: jax.Array, kv_BSC: jax.Array) -> bool:
    """Whether kernels compute whole rows, and new tokens over a cache; says once why not."""
    problem = unsupported(q_BSHC, kv_BSC)
    if problem:
      log_fallback('compressed_attention', 'mosaic', 'masks over all pairs', problem)
    return problem is None

  def _fused(
    self,
    x_BSD: jax.Array,
    latent_BSQ: jax.Array,
    q_BSHC: jax.Array,
    kv_BSC: jax.Array,
    sink_H: jax.Array,
    where: Where,
    freq: np.ndarray,
  ) -> tuple[jax.Array, Aux]:
    window, C = self.cfg.window, self.cfg.d_head
    seen = self._seen(x_BSD, latent_BSQ, q_BSHC, kv_BSC, where, freq)
    o_BSHC, lse_BSH = compressed_attention(
      q_BSHC,
      kv_BSC,
      seen.entry_BNC,
      sink_H,
      seen.runs,
      seen.index_BSK,
      window=window,
      scale=C**-0.5,
    )
    return o_BSHC, seen.aux(lse_BSH)

  def _seen(
    self,
    x_BSD: jax.Array,
    latent_BSQ: jax.Array,
    q_BSHC: jax.Array,
    kv_BSC: jax.Array,
    where: Where,
    freq: np.ndarray,
  ) -> Seen:
    del x_BSD, latent_BSQ, q_BSHC, freq
    return Seen(kv_BSC[:, :0], self._runs(where, 0))

  def _runs(self, where: Where, ratio: int) -> Spans:
    window = self.cfg.window
    return spans(where.position_BS, where.segment_BS, window=window, ratio=ratio)

  def _project(
    self, equation: str, x: jax.Array, name: str, shape: tuple[int, ...], spec: jax.P, **kwargs: Any
  ) -> jax.Array:
    w = matrix(self, name, shape, spec, std=self.std)
    return matmul(equation, x, w, spec, policy=self.policy, **kwargs)

  def _out(self, o_BSHC: jax.Array, D: int) -> jax.Array:
    (B, S, H, C), G, R = o_BSHC.shape, self.cfg.num_groups, self.cfg.group_rank
    X = H // G * C
    o_BSGX = jnp.reshape(o_BSHC, (B, S, G, X), out_sharding=sh.HEADS)
    o_BSGR = self._project('bsgx,gxr->bsgr', o_BSGX, 'out_down_GXR', (G, X, R), sh.GROUPS_GXR)
    return self._project(
      'bsgr,grd->bsd', o_BSGR, 'out_up_GRD', (G, R, D), sh.GROUPS_GRD, out=sh.STREAM
    )

  @staticmethod
  def empty_cache(cfg: CompressedConfig, batch: int, length: int, dtype: Any) -> Cache:
    """The newest `window` keys, however long the row."""
    del length
    shape = (batch, cfg.window, cfg.d_head)
    return {'window_BWC': jnp.zeros(shape, dtype, out_sharding=sh.STREAM)}


class HCA(Sliding):
  """Heavily compressed attention: the window and an entry for every `hca_ratio` tokens."""

  compressed: ClassVar[bool] = True

  def _branch(self, x_BSD, latent_BSQ, where, cache, freq) -> Branch:
    c = self.cfg
    compressor = Compressor(
      c.d_head, c.hca_ratio, False, self.std, self.eps, self.policy, name='compressor'
    )
    entries, new = compressor(x_BSD, where, cache and cache['compressor'], freq=freq)
    visible_BSN = entries_visible(
      _index(where), entries.end_BN, where.segment_BS, entries.segment_BN
    )
    caches = {'compressor': new} if new else {}
    return Branch(entries.entry_BNC, visible_BSN, caches, lambda _: {}, c.hca_ratio)

  def _seen(self, x_BSD, latent_BSQ, q_BSHC, kv_BSC, where, freq) -> Seen:
    c = self.cfg
    compressor = Compressor(
      c.d_head, c.hca_ratio, False, self.std, self.eps, self.policy, name='compressor'
    )
    entries, _ = compressor(x_BSD, where, None, freq=freq)
    return Seen(entries.entry_BNC, self._runs(where, c.hca_ratio))

  @staticmethod
  def empty_cache(cfg: CompressedConfig, batch: int, length: int, dtype: Any) -> Cache:
    """The window, and d_head numbers for every `hca_ratio` tokens."""
    compressor = Compressor.empty_cache(
      batch, length, dtype, width=cfg.d_head, ratio=cfg.hca_ratio, overlap=False
    )
    return Sliding.empty_cache(cfg, batch, length, dtype) | {'compressor': compressor}


class CSA(Sliding):
  """Compressed sparse attention: the window and, of an entry for every `csa_ratio` tokens, the
  `index_top_k` that the indexer scores highest.

  The indexer reads its input without passing gradients on, and the choice passes none to it: it
  learns from `indexer_loss` alone, and the rest of the model from everything else.
  """

  compressed: ClassVar[bool] = True

  def _branch(self, x_BSD, latent_BSQ, where, cache, freq) -> Branch:
    c = self.cfg
    compressor = Compressor(
      c.d_head, c.csa_ratio, True, self.std, self.eps, self.policy, name='compressor'
    )
    entries, new = compressor(x_BSD, where, cache and cache['compressor'], freq=freq)
    indexer = EntryIndexer(c, self.std, self.eps, self.policy, name='indexer')
    scored, new_indexer = indexer(
      *jax.lax.stop_gradient((x_BSD, latent_BSQ)), where, cache and cache['indexer'], freq=freq
    )
    score_BSN = entry_scores(*scored)
    visible_BSN = entries_visible(
      _index(where), entries.end_BN, where.segment_BS, entries.segment_BN
    )
    selected_BSN = visible_BSN
    if c.stage == 'sparse':
      selected_BSN = select_top_k(score_BSN, visible_BSN, k=c.index_top_k)

    def aux(mass_BSN: jax.Array) -> Aux:
      if cache is not None or not c.index_loss_weight:
        return {}
      loss = index_loss(score_BSN, mass_BSN, selected_BSN, where.segment_BS > 0)
      return {'indexer_loss': c.index_loss_weight * loss}

    caches = {'compressor': new, 'indexer': new_indexer} if new else {}
    return Branch(entries.entry_BNC, selected_BSN, caches, aux, c.csa_ratio, score_BSN)

  def _fuses(self, q_BSHC: jax.Array, kv_BSC: jax.Array) -> bool:
    # the warm-up attends to all entries, which masks do
    return self.cfg.stage == 'sparse' and super()._fuses(q_BSHC, kv_BSC)

  def _seen(self, x_BSD, latent_BSQ, q_BSHC, kv_BSC, where, freq) -> Seen:
    c = self.cfg
    compressor = Compressor(
      c.d_head, c.csa_ratio, True, self.std, self.eps, self.policy, name='compressor'
    )
    entry_BNC = compressor(x_BSD, where, None, freq=freq)[0].entry_BNC
    indexer = EntryIndexer(c, self.std, self.eps, self.policy, name='indexer')
    scored, _ = indexer(*jax.lax.stop_gradient((x_BSD, latent_BSQ)), where, None, freq=freq)
    runs = self._runs(where, c.csa_ratio)
    index_BSK = choose(*scored, runs.entry_first_BS, runs.entry_count_BS, k=c.index_top_k)
    index_BSK = jnp.pad(index_BSK, ((0, 0), (0, 0), (0, -index_BSK.shape[-1] % SLOT_BLOCK)))
    runs = runs._replace(entry_count_BS=jnp.minimum(runs.entry_count_BS, c.index_top_k))

    def aux(lse_BSH: jax.Array) -> Aux:
      if not c.index_loss_weight:
        return {}
      used_BSK = jnp.arange(index_BSK.shape[-1]) < runs.entry_count_BS[..., None]
      mass_BSK = chosen_mass(q_BSHC, entry_BNC, lse_BSH, runs, index_BSK, scale=c.d_head**-0.5)
      score_BSK = chosen_scores(*scored, index_BSK)
      loss = index_loss(score_BSK, mass_BSK, used_BSK, where.segment_BS > 0)
      return {'indexer_loss': c.index_loss_weight * loss}

    return Seen(entry_BNC, runs, index_BSK, aux)

  @staticmethod
  def empty_cache(cfg: CompressedConfig, batch: int, length: int, dtype: Any) -> Cache:
    """The window, and d_head + d_index numbers for every `csa_ratio` tokens."""
    sizes = {'compressor': cfg.d_head, 'indexer': cfg.d_index}
    return Sliding.empty_cache(cfg, batch, length, dtype) | {
      name: Compressor.empty_cache(
        batch, length, dtype, width=width, ratio=cfg.csa_ratio, overlap=True
      )
      for name, width in sizes.items()
    }


def _index(where: Where) -> jax.Array:
  """Index in the row of every new token."""
  return where.start_B[:, None] + jnp.arange(where.token_BS.shape[1])


def _window(
  kv_BSC: jax.Array, where: Where, cache: Cache | None, *, window: int
) -> tuple[jax.Array, jax.Array]:
  """Keys of the cached window and of the new tokens, and which of them each query sees."""
  q_index_BS = _index(where)
  if cache is None:
    visible_BSS = window_visible(
      q_index_BS, q_index_BS, where.segment_BS, where.segment_BS, window=window
    )
    return kv_BSC, visible_BSS
  key_BTC = jnp.concatenate([cache['window_BWC'].astype(kv_BSC.dtype), kv_BSC], axis=1)
  k_index_BT = where.start_B[:, None] - window + jnp.arange(key_BTC.shape[1])
  k_segment_BT = (k_index_BT >= 0).astype(jnp.int32)
  return key_BTC, window_visible(
    q_index_BS, k_index_BT, where.segment_BS, k_segment_BT, window=window
  )


def _zeros(_: Any, shape: tuple[int, ...]) -> jax.Array:
  return jnp.zeros(shape, jnp.float32, out_sharding=sh.PER_HEAD)
