"""NSA and MoBA choose the blocks that the papers' loops choose, and read no others."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops import moba, nsa
from moe_jax.ops.attention.grouped import grouped_probabilities
from moe_jax.ops.blocks import Span, first_of_block

# two documents of 13 and 6 tokens and one padded place
SEGMENT = np.array([1] * 13 + [2] * 6 + [0])
POSITION = np.array([*range(13), *range(6), 0])
T = SEGMENT.size
SIZES = nsa.Sizes(compress_length=4, stride=2, select_length=4, top_blocks=3, window=3)
SCALE = 0.5


def span() -> Span:
  segment, position = (jnp.asarray(a, jnp.int32)[None] for a in (SEGMENT, POSITION))
  return Span(segment, position, segment, position, jnp.zeros(1, jnp.int32))


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def softmax(score):
  e = np.exp(np.asarray(score, np.float64) - np.max(score))
  return e / e.sum()


def document(t: int) -> list[int]:
  """Indices of the tokens of t's document, in order."""
  return [s for s in range(T) if SEGMENT[s] == SEGMENT[t]]


def test_first_of_block_marks_one_token_of_each_block_of_each_document():
  marked = np.flatnonzero(first_of_block(span().same_block(4))[0])
  assert marked.tolist() == [0, 4, 8, 12, 13, 17, 19]


def expected_blocks(q, ck, t) -> set[int]:
  """Selection blocks of token t for one group: q [M, C], ck [T, C] at blocks' last tokens."""
  own, place = document(t), int(POSITION[t])
  l, d, size = SIZES.compress_length, SIZES.stride, SIZES.select_length
  count = (place + 1 - l) // d + 1 if place + 1 >= l else 0
  worth = np.zeros(place // size + 1)
  if count:
    for head in q:
      p = softmax([head @ ck[own[i * d + l - 1]] * SCALE for i in range(count)])
      for j in range(worth.size):
        for a in range(size // d):
          for b in range(l // d):
            i = size // d * j + size // d - 1 - a - b
            worth[j] += p[i] if 0 <= i < count else 0
  forced = {0, place // size, max(place // size - 1, 0)}
  rest = [j for j in np.argsort(-worth, kind='stable') if j not in forced]
  return forced | set(rest[: max(SIZES.top_blocks - len(forced), 0)])


def test_nsa_selects_the_blocks_of_the_papers_sum():
  q, ck = draw(1, T, 2, 3, 4), draw(1, T, 2, 4, seed=1)
  ends = nsa.block_ends(span().k_position_BT, length=4, stride=2)
  mask = (span().visible() & ends[:, None])[:, None, None]
  p_BGMST = grouped_probabilities(q, ck, mask, scale=SCALE)
  chosen = nsa.select_blocks(p_BGMST.sum(2), span(), sizes=SIZES)
  seen = set()
  for t in range(T - 1):
    for g in range(2):
      blocks = expected_blocks(np.asarray(q[0, t, g]), np.asarray(ck[0, :, g]), t)
      tokens = [s for s in document(t) if s <= t and POSITION[s] // 4 in blocks]
      assert np.flatnonzero(chosen[0, g, t]).tolist() == tokens, (t, g)
      seen.add(len(blocks))
  assert seen == {1, 2, 3}


def test_nsa_branches_read_only_their_own_keys_and_gates_weigh_them():
  q = draw(1, T, 2, 3, 4)
  branches = [
    nsa.KeyValue(draw(1, T, 2, 4, seed=i), draw(1, T, 2, 5, seed=i + 9)) for i in range(3)
  ]
  gates = jax.nn.one_hot(jnp.arange(3), 3)
  outs = []
  for gate in gates:
    gate_BSGM3 = jnp.broadcast_to(gate, (1, T, 2, 3, 3))
    outs.append(
      np.asarray(nsa.attention(q, *branches, gate_BSGM3, span(), sizes=SIZES, scale=SCALE))
    )
  # window: the last 3 tokens of the document
  for t in range(T - 1):
    near = [s for s in document(t) if t - 3 < s <= t]
    p = softmax([q[0, t, 1, 2] @ branches[2].k_BTGC[0, s, 1] * SCALE for s in near])
    expected = sum(w * branches[2].v_BTGV[0, s, 1] for w, s in zip(p, near, strict=True))
    np.testing.assert_allclose(outs[2][0, t, 1, 2], expected, atol=1e-5)
  # compression: nothing before a document's first block is whole
  assert not outs[0][0, [0, 1, 2, 13, 14, 15]].any()
  assert np.abs(outs[0][0, [3, 4, 12, 16, 18]]).min() > 0


def test_nsa_compresses_each_document_from_its_own_start():
  ends = nsa.block_ends(span().k_position_BT, length=4, stride=2)
  assert np.flatnonzero(ends[0]).tolist() == [3, 5, 7, 9, 11, 16, 18]
  x, place, up, down = draw(1, T, 2, 4), draw(4, 4), draw(4, 4, 6), draw(6, 4)
  whole = nsa.compress(x, place, up, down)
  alone = nsa.compress(x[:, 13:], place, up, down)
  np.testing.assert_allclose(whole[:, [16, 18]], alone[:, [3, 5]], rtol=1e-6)
  h = jax.nn.silu(jnp.einsum('lc,lcx->x', x[0, 13:17, 1] + place, up))
  np.testing.assert_allclose(whole[0, 16, 1], h @ down, rtol=1e-5, atol=1e-5)


def test_moba_routes_each_head_to_its_own_block_and_the_best_earlier_ones():
  q, k = draw(1, T, 2, 3, 4), draw(1, T, 2, 4, seed=1)
  keys = moba.routed(q, k, span(), block=3, top_k=2)
  for t in range(T - 1):
    own, block = document(t), int(POSITION[t]) // 3
    for g, m in np.ndindex(2, 3):
      mean = [np.mean([k[0, own[3 * j + i], g] for i in range(3)], 0) for j in range(block)]
      score = [float(q[0, t, g, m] @ v) for v in mean]
      blocks = {block, *np.argsort(score)[::-1][:2].tolist()}
      tokens = [s for s in own if s <= t and POSITION[s] // 3 in blocks]
      assert np.flatnonzero(keys[0, g, m, t]).tolist() == tokens, (t, g, m)
