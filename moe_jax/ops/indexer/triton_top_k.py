"""Exact top-k of rows in one read: a Pallas-Triton kernel that keeps a row in registers.

A row's scores become integers of the same order. The k-th largest is found by halving the interval
between the least and the largest, counting what is above the middle each time, until k are above or
one integer is left; equal ones are then taken from the first. A running count gives each chosen
place its position, so that places come out in ascending order.

Rows longer than a program's registers are cut: the k best of every piece, then the k best of these,
which are exact and keep the order of places. Traffic: every score once. 4096 rows of 32768 take
1.8 ms on an H100, where reading them takes 0.2.
"""

# R rows  S places  K chosen  P pieces

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_PIECE = 16384
_LOWEST = -(2**31)


def top_k(
  score_RS: jax.Array,
  first_R: jax.Array,
  end_R: jax.Array,
  *,
  k: int,
  piece: int = _PIECE,
  num_warps: int | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Places and scores [R, K] of the k highest within first_R to end_R, the earliest of equals.

  In ascending order of places; where there are fewer than k, the rest are place 0 and score -inf.
  """
  S = score_RS.shape[1]
  if piece >= S:
    size = max(32, 1 << (S - 1).bit_length())
    return _top_k_pieces(
      score_RS, first_R, end_R, k=k, piece=size, num_warps=num_warps, interpret=interpret
    )
  place_RX, score_RX = _top_k_pieces(
    score_RS, first_R, end_R, k=k, piece=piece, num_warps=num_warps, interpret=interpret
  )
  at_RK, best_RK = top_k(
    score_RX, jnp.zeros_like(first_R), jnp.full_like(end_R, score_RX.shape[1]),
    k=k, piece=max(piece, 2 * k), num_warps=num_warps, interpret=interpret,
  )  # fmt: skip
  return jnp.take_along_axis(place_RX, at_RK, axis=1), best_RK


def _top_k_pieces(
  score_RS, first_R, end_R, *, k: int, piece: int, num_warps: int | None, interpret: bool
):
  R, S = score_RS.shape
  pieces = pl.cdiv(S, piece)
  most = 1 << (k - 1).bit_length()
  # the interpreter writes back what a mask protects, so there it needs a place of its own
  width = k + 1 if interpret else k

  def kernel(score_g, first_g, end_g, place_g, best_g):
    row, part = pl.program_id(0), pl.program_id(1)
    place = part * piece + jnp.arange(piece, dtype=jnp.int32)
    inside = (place >= first_g[row]) & (place < jnp.minimum(end_g[row], S))
    score = plt.load(score_g.at[row, pl.ds(part * piece, piece)], mask=inside, other=0.0)
    # -0 equals 0, and is the same integer
    bits = jnp.where(score == 0, 0, lax.bitcast_convert_type(score, jnp.int32))
    key = jnp.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), _LOWEST)
    total = inside.astype(jnp.int32).sum()
    few = total <= k
    low = jnp.where(few, _LOWEST, jnp.where(inside, key, 2**31 - 1).min())
    high = jnp.where(few, _LOWEST, key.max())

    def undecided(state):
      low, high, count = state
      # count places are at least `low`; fewer than k are above `high`
      return (count != k) & (low < high)

    def halve(state):
      low, high, count = state
      middle = high - ((high - low).astype(jnp.uint32) // 2).astype(jnp.int32)
      above = (key >= middle).astype(jnp.int32).sum()
      enough = above >= k
      return (
        jnp.where(enough, middle, low),
        jnp.where(enough, high, middle - 1),
        jnp.where(enough, above, count),
      )

    low, _, count = lax.while_loop(undecided, halve, (low, high, total))
    exact = count == k
    is_above = lambda: inside & ((key > low) | (exact & (key == low)))
    is_equal = lambda: inside & (key == low) & jnp.logical_not(exact)
    # both counts in one integer: below 2^16 and below 2^15 before any place
    one = is_above().astype(jnp.int32) + (is_equal().astype(jnp.int32) << 16)
    before = lax.cumsum(one) - one
    room = k - is_above().astype(jnp.int32).sum()
    equals_before = lax.shift_right_logical(before, 16)
    chosen = is_above() | (is_equal() & (equals_before < room))
    position = (before & 0xFFFF) + jnp.minimum(equals_before, room)
    at = part * width + jnp.where(chosen, position, width - 1)
    rows = jnp.broadcast_to(row, at.shape)
    plt.store(place_g.at[rows, at], place, mask=chosen)
    # from the integer, so that the scores need no registers of their own
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    plt.store(best_g.at[rows, at], lax.bitcast_convert_type(bits, jnp.float32), mask=chosen)
    slot = jnp.arange(most, dtype=jnp.int32)
    unused = (slot >= jnp.minimum(total, k)) & (slot < k)
    rows = jnp.broadcast_to(row, slot.shape)
    at = part * width + jnp.where(unused, slot, width - 1)
    plt.store(place_g.at[rows, at], jnp.zeros_like(slot), mask=unused)
    plt.store(best_g.at[rows, at], jnp.full(slot.shape, -jnp.inf), mask=unused)

  shape = R, pieces * width
  out = pl.pallas_call(
    kernel,
    grid=(R, pieces),
    out_shape=(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)),
    compiler_params=plt.CompilerParams(
      num_warps=num_warps or max(4, min(16, piece // 1024)), num_stages=1
    ),
    interpret=interpret,
    name='top_k',
  )(score_RS, first_R, end_R)
  place_RX, best_RX = (a.reshape(R, pieces, width)[..., :k].reshape(R, -1) for a in out)
  return place_RX, best_RX
