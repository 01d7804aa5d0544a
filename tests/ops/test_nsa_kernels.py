"""NSA's kernels, interpreted, against its masks: values and gradients over several documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import nsa
from moe_jax.ops.blocks import Span
from moe_jax.ops.nsa import fused, triton_runs

# G key-value heads  M query heads of each  C width
G, M, C, SCALE = 2, 4, 16, 0.25
SIZES = nsa.Sizes(compress_length=4, stride=2, select_length=4, top_blocks=4, window=6)


def places(documents, S):
  position_BS, segment_BS = np.zeros((2, len(documents), S), np.int32)
  for b, lengths in enumerate(documents):
    T = sum(lengths)
    position_BS[b, :T] = np.concatenate([np.arange(n) for n in lengths])
    segment_BS[b, :T] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return jnp.asarray(position_BS), jnp.asarray(segment_BS)


def compare(documents, dtype, tolerance):
  B, S = len(documents), max(map(sum, documents))
  position_BS, segment_BS = places(documents, S)
  keys = jax.random.split(jax.random.key(0), 9)
  draw = lambda i, *shape: jax.random.normal(keys[i], shape).astype(dtype)
  q, do = draw(0, B, S, G, M, C), draw(1, B, S, G, M, C)
  branches = tuple(draw(i, B, S, G, C) for i in range(2, 8))
  gate = jax.nn.sigmoid(draw(8, B, S, G, M, 3))
  end_BN, _ = nsa.closed_blocks(position_BS, segment_BS, SIZES)
  # padding is nobody's: its outputs do not count
  do = jnp.where((segment_BS > 0)[..., None, None, None], do, 0)

  def masks(q, gate, *kv):
    span = Span(segment_BS, position_BS, segment_BS, position_BS, jnp.zeros(B, jnp.int32))
    compressed, selected, window = (nsa.KeyValue(kv[i], kv[i + 1]) for i in (0, 2, 4))
    return nsa.attention(q, compressed, selected, window, gate, span, sizes=SIZES, scale=SCALE)

  def kernels(q, gate, *kv):
    compressed = nsa.KeyValue(*(jax.vmap(lambda x, at: x[at])(x, end_BN) for x in kv[:2]))
    selected, window = nsa.KeyValue(kv[2], kv[3]), nsa.KeyValue(kv[4], kv[5])
    return nsa.rows_attention(
      q, compressed, selected, window, gate, position_BS, segment_BS, sizes=SIZES, scale=SCALE
    )

  wide = [a.astype(jnp.float32) for a in (q, gate, *branches)]
  want, pull = jax.vjp(masks, *wide)
  got, pull_got = jax.vjp(jax.jit(kernels), q, gate, *branches)
  real = np.asarray(segment_BS) > 0
  pairs = zip((got[real], *pull_got(do)), (want[real], *pull(do.astype(jnp.float32))), strict=True)
  for a, b in pairs:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


@pytest.mark.slow
def test_kernels_of_all_branches_are_the_masks():
  compare([[21, 3, 9]], jnp.float32, 1e-5)


@pytest.mark.slow
def test_rows_of_several_documents_and_chunks(monkeypatch):
  monkeypatch.setattr(fused, '_CHUNK_BYTES', 1 << 12)
  monkeypatch.setattr(fused, '_CHUNK_CHOICES', 1 << 8)
  compare([[70, 1, 65], [2, 90]], jnp.float32, 1e-5)


@pytest.mark.parametrize('start', (0, 8))
def test_importance_is_the_sum_of_probabilities_over_heads(start):
  q, k = (jax.random.normal(jax.random.key(i), (n, G, M, C)) for i, n in ((0, 40), (1, 20)))
  first = jnp.arange(40, dtype=jnp.int32) // 16 * 4
  count = jnp.arange(40, dtype=jnp.int32) % 16
  k_RGC = k[:, :, 0]
  score = jnp.einsum('tgmc,rgc->tgmr', q, k_RGC) * SCALE
  behind = jnp.arange(20) - first[:, None]
  seen = ((behind >= 0) & (behind < count[:, None]))[:, None, None]
  lse = jax.nn.logsumexp(jnp.where(seen, score, -1e30), axis=-1) / jnp.log(2.0)
  p_TGR = jnp.where(seen, jnp.exp(score - lse[..., None] * jnp.log(2.0)), 0).sum(2)
  got = triton_runs.importance(
    q, k_RGC, first, count, lse, jnp.array([start]), queries=32, width=16, scale=SCALE
  )
  at = jnp.minimum(first[:, None] + jnp.arange(16), 19)
  want = jnp.take_along_axis(p_TGR, at[:, None], axis=-1)
  want = jnp.where(jnp.arange(16) < count[:, None, None], want, 0)[start : start + 32]
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_kernels_say_why_they_cannot():
  q = jnp.zeros((1, 4, G, M, C), jnp.bfloat16)
  assert 'needs an NVIDIA GPU' in (nsa.unsupported(q, C) or '')
