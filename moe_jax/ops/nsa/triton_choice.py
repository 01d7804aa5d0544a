"""Triton kernel: which blocks a query takes, from their scores.

A warp keeps the scores of one query and group in registers and takes the largest `k` times: few are
chosen, and a pass over a row in registers costs less than reading it. Traffic: every score once.
"""

# Q queries  G key-value heads  J blocks of a document  K chosen blocks  R rows (Q*G)

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
  score_QGJ: jax.Array, scored_Q: jax.Array, last_Q: jax.Array, *, k: int
) -> jax.Array:
  """int32 [Q, G, k]: the first block, the query's own, the one before, and those that score most.

  The earliest of equals. Where fewer than k blocks are there, the rest are any numbers below J.

  Args:
    score_QGJ: not negative; read of the first `scored_Q` blocks, the others score 0.
    last_Q: number of the query's own block, the last it may take.
  """
  Q, G, J = score_QGJ.shape
  rows, width = Q * G, 1 << max(J - 1, 1).bit_length()

  def kernel(score_g, scored_g, last_g, out_g):
    row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS, dtype=jnp.int32)
    live, row = row < rows, jnp.minimum(row, rows - 1)
    scored, last = (plt.load(ref.at[row // G])[:, None] for ref in (scored_g, last_g))
    column = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (_ROWS, width))
    at = jnp.broadcast_to(row[:, None], column.shape), jnp.minimum(column, J - 1)
    score = plt.load(score_g.at[at], mask=column < jnp.minimum(scored, J), other=0.0)
    # the interpreter reads masked places too
    score = jnp.where(column < scored, score, 0.0)
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
    kernel, score_QGJ.reshape(rows, J), scored_Q, last_Q,
    grid=(pl.cdiv(rows, _ROWS),), out=jax.ShapeDtypeStruct((rows * k,), jnp.int32),
    num_warps=_ROWS, num_stages=1,
  )  # fmt: skip
  return out.reshape(Q, G, k)
