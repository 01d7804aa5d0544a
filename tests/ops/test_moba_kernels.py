"""MoBA's kernels, interpreted, against its masks: values and gradients over several documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import moba
from moe_jax.ops.blocks import Span
from moe_jax.ops.moba import sorted as by_block
from tests.ops.documents import together

# G key-value heads  M query heads of each  C width
G, M, C, SCALE = 2, 2, 16, 0.25


def compare(documents, *, block, top_k):
  B, S = len(documents), max(map(sum, documents))
  position_BS, segment_BS = together(documents, S)
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (B, S, G, M, C), (B, S, G, C), (B, S, G, C), (B, S, G, M, C)
  q, k, v, do = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
  # padding is nobody's: its outputs do not count
  do = jnp.where((segment_BS > 0)[..., None, None, None], do, 0)
  sizes = {'block': block, 'top_k': top_k, 'scale': SCALE}

  def masks(q, k, v):
    span = Span(segment_BS, position_BS, segment_BS, position_BS, jnp.zeros(B, jnp.int32))
    return moba.attention(q, k, v, span, **sizes)

  def kernels(q, k, v):
    return moba.rows_attention(q, k, v, position_BS, segment_BS, **sizes)

  def both(fn):
    def call(*args):
      o, pull = jax.vjp(fn, *args)
      return o, *pull(do)

    return jax.jit(call)(q, k, v)

  real = np.asarray(segment_BS) > 0
  (got, *got_grads), (want, *grads) = both(kernels), both(masks)
  for a, b in zip((got[real], *got_grads), (want[real], *grads), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


@pytest.mark.slow
def test_kernels_are_the_masks():
  compare([[21, 3, 9]], block=4, top_k=2)


@pytest.mark.slow
def test_rows_of_several_documents_and_chunks(monkeypatch):
  monkeypatch.setattr(by_block, '_CHUNK_BYTES', 1 << 12)
  compare([[70, 1, 65], [2, 90]], block=8, top_k=3)


@pytest.mark.slow
def test_fewer_blocks_than_may_be_chosen():
  compare([[20]], block=8, top_k=5)


def test_the_kernels_say_why_they_cannot():
  assert 'needs an NVIDIA GPU' in (moba.unsupported(jnp.zeros((1, 40, G, M, C)), C, 8) or '')
