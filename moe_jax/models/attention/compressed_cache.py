"""V4's attention of new tokens over its caches by a kernel, on each device of the mesh."""

import jax
import jax.numpy as jnp

from moe_jax import sharding as sh
from moe_jax.ops.decode_attention import compressed_decode_attention
from moe_jax.ops.indexer import select_from_scores
from moe_jax.ops.sink_attention import Spans

# B batch  S new tokens  T window and new tokens  N entries  H heads  C head width


def attend_caches(
  q_BSHC: jax.Array,
  key_BTC: jax.Array,
  entry_BNC: jax.Array,
  sink_H: jax.Array,
  index_BS: jax.Array,
  score_BSN: jax.Array | None,
  *,
  window: int,
  ratio: int,
  k: int,
  scale: float,
) -> jax.Array:
  """Passes no gradient.

  Args:
    key_BTC: of the cached window, then of the new tokens.
    entry_BNC: an entry for every `ratio` tokens of the row; N = 0 where there are none.
    index_BS: of every new token in its row, which is one document.
    score_BSN: by which the k entries that a query sees are chosen; None: it sees all.
  """
  T, N = key_BTC.shape[1], entry_BNC.shape[1]

  def on_device(q, key, entry, sink, index, score=None):
    S = q.shape[1]
    none = jnp.zeros_like(index)
    closed = jnp.minimum((index + 1) // ratio, N) if N else none
    seen = jnp.minimum(index + 1, window)
    runs = Spans(T - S + 1 + jnp.arange(S) - seen, seen, none, closed)
    chosen = None
    if score is not None:
      chosen, count = select_from_scores(score, none, closed, k=k)
      runs = runs._replace(entry_count_BS=count)
    return compressed_decode_attention(q, key, entry, sink, runs, chosen, scale=scale)

  operands = q_BSHC, key_BTC, entry_BNC, sink_H, index_BS
  specs = sh.HEADS, sh.STREAM, sh.STREAM, sh.PER_HEAD, sh.TOKENS
  if score_BSN is not None:
    operands, specs = (*operands, score_BSN), (*specs, sh.STREAM)
  return jax.shard_map(
    on_device, in_specs=specs, out_specs=sh.HEADS,
    check_vma=False,  # kernels carry no such types
  )(*map(jax.sharding.reshard, operands, specs))  # fmt: skip
