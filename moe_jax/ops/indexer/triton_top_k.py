"""Exact top-k of rows in one read: a Pallas-Triton kernel that keeps a row in registers.

The k-th largest is found by narrowing an interval of float32 numbers, by their place in the order
of all of them, until k scores are above its lower end or one number is left. Every try counts the
scores above a number within it: first what a normal distribution would have there, then where the
counts of both ends, as if they fell exponentially, say (false position, the Illinois way); after a
few tries the interval is halved. Of scores equal to the k-th the first are taken: a running count
over the row gives each chosen place its position, so that they come out in ascending order.

Rows longer than a program's registers are cut: the k best of every piece, then the k best of these,
which are exact and keep the order of places. Traffic: every score once.
"""

# R rows  S places  K chosen  P pieces

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_PIECE = 32768
_WARPS = 16
# places of a row that a warp counts by itself
_SPAN = 128
# places of minus and plus infinity
_LEAST, _MOST = -0x7F800001, 0x7F800000
# guesses before the interval is halved every time
_GUESSES = 9
# standard deviations for a factor of 2 in the share above, where that is a sixteenth
_SLOPE = 0.35


def top_k(
  score_RS: jax.Array,
  first_R: jax.Array,
  end_R: jax.Array,
  *,
  k: int,
  piece: int = _PIECE,
  num_warps: int = _WARPS,
  interpret: bool = False,
) -> jax.Array:
  """Places [R, K] of the k highest within first_R to end_R, the earliest of equals.

  In ascending order; where there are fewer than k, the rest are place 0.
  """
  S = score_RS.shape[1]
  some = functools.partial(_top_k_pieces, k=k, num_warps=num_warps, interpret=interpret)
  if piece >= S:
    size = max(32, 1 << (S - 1).bit_length())
    (place_RK,) = some(score_RS, first_R, end_R, piece=size, scores=False)
    return place_RK
  place_RX, score_RX = some(score_RS, first_R, end_R, piece=piece, scores=True)
  at_RK = top_k(
    score_RX, jnp.zeros_like(first_R), jnp.full_like(end_R, score_RX.shape[1]),
    k=k, piece=max(piece, 2 * k), num_warps=num_warps,
    interpret=interpret,
  )  # fmt: skip
  return jnp.take_along_axis(place_RX, at_RK, axis=1)


def _top_k_pieces(
  score_RS: jax.Array,
  first_R: jax.Array,
  end_R: jax.Array,
  *,
  k: int,
  piece: int,
  num_warps: int,
  scores: bool,
  interpret: bool,
) -> list[jax.Array]:
  """Places [R, P*K] of the k highest of every piece, and their scores, -inf where there is none."""
  R, S = score_RS.shape
  pieces = pl.cdiv(S, piece)
  num_warps = min(num_warps, max(4, piece // 1024))
  most = 1 << (k - 1).bit_length()
  # the interpreter writes back what a mask protects, so there it needs a place of its own
  width = k + 1 if interpret else k

  def kernel(score_g, first_g, end_g, place_g, *best_g):
    row, part = pl.program_id(0), pl.program_id(1)
    begin = part * piece
    first = jnp.maximum(first_g[row], begin)
    end = jnp.minimum(jnp.minimum(end_g[row], S), begin + piece)

    place = begin + jnp.arange(piece, dtype=jnp.int32)
    inside = (place >= first) & (place < end)
    score = plt.load(score_g.at[row, pl.ds(begin, piece)], mask=inside, other=-jnp.inf)
    total = jnp.maximum(end - first, 0)
    few = total <= k
    low, count, above = _least_of_best(score, inside, total, few, k)
    # without a cut between scores, all above `low` are chosen and the first of its equals
    exact = few | (count == k)
    room = jnp.where(exact, 0, k - above)
    low = _score(low)

    is_above = inside & ((score > low) | (exact & (score == low)))
    is_equal = inside & (score == low) & jnp.logical_not(exact)
    # both counts in one integer, each at most 2^15
    one = is_above.astype(jnp.int32) + (is_equal.astype(jnp.int32) << 16)
    before = _count_before(one)
    equals_before = lax.shift_right_logical(before, 16)
    chosen = is_above | (is_equal & (equals_before < room))
    position = (before & 0xFFFF) + jnp.minimum(equals_before, room)
    at = part * width + jnp.where(chosen, position, width - 1)
    rows = jnp.broadcast_to(row, at.shape)
    plt.store(place_g.at[rows, at], place, mask=chosen)
    if scores:
      plt.store(best_g[0].at[rows, at], score, mask=chosen)

    slot = jnp.arange(most, dtype=jnp.int32)
    unused = (slot >= jnp.minimum(total, k)) & (slot < k)
    rows = jnp.broadcast_to(row, slot.shape)
    at = part * width + jnp.where(unused, slot, width - 1)
    plt.store(place_g.at[rows, at], jnp.zeros_like(slot), mask=unused)
    if scores:
      plt.store(best_g[0].at[rows, at], jnp.full(slot.shape, -jnp.inf), mask=unused)

  dtypes = (jnp.int32, jnp.float32) if scores else (jnp.int32,)
  out = pl.pallas_call(
    kernel,
    grid=(R, pieces),
    out_shape=[jax.ShapeDtypeStruct((R, pieces * width), dtype) for dtype in dtypes],
    compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
    interpret=interpret,
    name='top_k',
  )(score_RS, first_R, end_R)
  return [a.reshape(R, pieces, width)[..., :k].reshape(R, -1) for a in out]


def _least_of_best(
  score: jax.Array, inside: jax.Array, total: jax.Array, few: jax.Array, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """A place in the order of floats, how many scores are at least as high, and how many are above.

  k are at least as high, or the place is that of the k-th largest.
  """
  zero = total * 0
  wide = lambda x: jnp.asarray(x).astype(jnp.float32)
  log, aim = lambda count: jnp.log2(jnp.maximum(wide(count), 0.5)), math.log2(k)
  n = jnp.maximum(wide(total), 1.0)
  mean = jnp.where(inside, score, 0.0).sum() / n
  deviation = jnp.sqrt(jnp.where(inside, (score - mean) ** 2, 0.0).sum() / n)
  guess = _key(mean + _normal_quantile(jnp.minimum(k / n, 1.0)) * deviation)
  low, high = zero + _LEAST, jnp.where(few, _LEAST, zero + _MOST)

  def undecided(state):
    low, high, count, *_ = state
    # count places are at least `low`; fewer than k, `above`, are higher than `high`
    return (count != k) & (low < high)

  def narrow(state):
    low, high, count, above, key, low_weight, high_weight, side, tries = state
    key = jnp.clip(key, low + 1, high)
    here = _count(score, key)
    enough = here >= k
    low, high = jnp.where(enough, key, low), jnp.where(enough, high, key - 1)
    count, above = jnp.where(enough, here, count), jnp.where(enough, above, here)
    # where one end stays for a second time, its share is halved
    low_weight = jnp.where(enough, 1.0, jnp.where(side < 0, low_weight * 0.5, low_weight))
    high_weight = jnp.where(enough, jnp.where(side > 0, high_weight * 0.5, high_weight), 1.0)
    side = jnp.where(enough, zero + 1, zero - 1)
    below, beyond = (log(count) - aim) * low_weight, (aim - log(above)) * high_weight
    width = (high - low).astype(jnp.uint32)
    part = jnp.minimum(wide(width) * (below / (below + beyond)), 4.29e9).astype(jnp.uint32)
    key = low + jnp.minimum(part, width).astype(jnp.int32)
    # with one end only: as far as scores of a normal distribution would have it, and half as much
    step = jnp.where(enough, below, -beyond) * (_SLOPE * 1.5) * deviation
    open_ = (low == _LEAST) | (high == _MOST)
    key = jnp.where(open_, _key(_score(jnp.where(enough, low, high + 1)) + step), key)
    tries += 1
    key = jnp.where((tries >= _GUESSES) | (tries & 3 == 0), _middle(low, high), key)
    return low, high, count, above, key, low_weight, high_weight, side, tries

  one = wide(zero) + 1.0
  state = low, high, total, zero, guess, one, one, zero, zero
  low, _, count, above, *_ = lax.while_loop(undecided, narrow, state)
  return low, count, above


def _count_before(one: jax.Array) -> jax.Array:
  """The sum of what precedes each: within spans of a warp, and of the spans before."""
  spans = one.reshape(-1, min(_SPAN, one.size))
  total = spans.sum(axis=1)
  return (lax.cumsum(spans, axis=1) - spans + (lax.cumsum(total) - total)[:, None]).reshape(-1)


def _normal_quantile(share: jax.Array) -> jax.Array:
  """What a share of a normal distribution is above, within 5e-4 (Abramowitz and Stegun 26.2.23)."""
  tail = jnp.maximum(jnp.minimum(share, 1 - share), 1e-6)
  t = jnp.sqrt(-2 * jnp.log(tail))
  over = 2.515517 + t * (0.802853 + t * 0.010328)
  under = 1 + t * (1.432788 + t * (0.189269 + t * 0.001308))
  return jnp.where(share < 0.5, t - over / under, over / under - t)


def _count(score: jax.Array, key: jax.Array) -> jax.Array:
  """How many are at least as high as the key's; a float's sum is exact, and its compare cheap."""
  return jnp.where(score >= _score(key), 1.0, 0.0).sum().astype(jnp.int32)


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
  """Rounded up; their difference may not fit in an int32."""
  return high - ((high - low).astype(jnp.uint32) // 2).astype(jnp.int32)


def _key(score: jax.Array) -> jax.Array:
  """The inverse of `_score`."""
  bits = lax.bitcast_convert_type(score, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _score(key: jax.Array) -> jax.Array:
  """The float32 number of a place in their order: integers that ascend as the numbers do."""
  return lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)
