"""Triton kernel: which blocks a query takes, from what its compressed blocks got of its attention.

A warp keeps the scores of one query and group in registers and takes the largest `k` times: few are
chosen, and a pass over a row in registers costs less than reading it. Traffic: every sum once from
device memory, and as often as blocks overlap from L1.
"""

# Q queries  G key-value heads  R compressed blocks of all rows  J blocks of a document
# K chosen blocks

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton

# rows of a program, a warp each
_ROWS = 4
# above any sum of probabilities
_FORCED = 1e9


def top_blocks(
  sum_QGR: jax.Array,
  first_Q: jax.Array,
  count_Q: jax.Array,
  last_Q: jax.Array,
  *,
  k: int,
  blocks: int,
  per_block: int,
  reach: int,
) -> jax.Array:
  """int32 [Q, G, k]: the first block, the query's own, the one before, and those that score most.

  The earliest of equals. Where fewer than k blocks are there, the rest are any numbers below J.
  Block j is `per_block` places from per_block * j on and scores the sum of what overlaps it, times
  the overlap: the i-th compressed block of a document has the places i to i + reach - 1.

  Args:
    sum_QGR: not negative; read of the compressed blocks that a query sees, `count` from `first` on.
    last_Q: number of the query's own block, the last it may take.
    blocks: J.
  """
  (Q, G, R), J = sum_QGR.shape, blocks
  rows, width = Q * G, 1 << max(J - 1, 1).bit_length()

  def kernel(sum_g, first_g, count_g, last_g, out_g):
    row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS, dtype=jnp.int32)
    live, row = row < rows, jnp.minimum(row, rows - 1)
    numbers = first_g, count_g, last_g
    first, count, last = (plt.load(ref.at[row // G])[:, None] for ref in numbers)
    column = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (_ROWS, width))
    score = jnp.zeros(column.shape, jnp.float32)
    for ahead in range(1 - reach, per_block):
      overlap = min(ahead + reach, per_block) - max(ahead, 0)
      key = column * per_block + ahead
      seen = (key >= 0) & (key < count)
      at = jnp.broadcast_to(row[:, None], column.shape), jnp.where(seen, first + key, 0)
      # the interpreter reads masked places too
      score += overlap * jnp.where(seen, plt.load(sum_g.at[at], mask=seen, other=0.0), 0.0)
    forced = (column < 1) | (last - column < 2)
    score = jnp.where(forced, _FORCED, score)
    score = jnp.where(column <= jnp.minimum(last, J - 1), score, -1.0)

    def take(i, score):
      best = score.max(axis=1)
      chosen = jnp.where(score == best[:, None], column, width).min(axis=1)
      place = jnp.where(live, row * k + i, rows * k)
      plt.store(out_g.at[place], jnp.minimum(chosen, J - 1), mask=live)
      return jnp.where(column == chosen[:, None], -2.0, score)

    lax.fori_loop(0, k, take, score)

  out = pallas_triton.call(
    kernel, sum_QGR.reshape(rows, R), first_Q, count_Q, last_Q,
    grid=(pl.cdiv(rows, _ROWS),), out=jax.ShapeDtypeStruct((rows * k,), jnp.int32),
    num_warps=_ROWS, num_stages=1,
  )  # fmt: skip
  return out.reshape(Q, G, k)
