"""Attention against sums written out in NumPy, its chunks, and its latent form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import attention as ops
from moe_jax.ops.attention import attention, chunked, latent_attention, reference, visible

# B batch  S queries  H heads  C key width  V value width  R latent width
B, S, H, C, V = 2, 32, 2, 8, 6
SCALE = 0.3
START = jnp.zeros(B, jnp.int32)


def make(s=S):
  keys = jax.random.split(jax.random.key(0), 3)
  return [
    jax.random.normal(key, (B, s, H, width)) for key, width in zip(keys, (C, C, V), strict=True)
  ]


def make_segments(s=S):
  """Documents of uneven length, one border inside a chunk, and padding at the end of row 1."""
  segment_BS = np.ones((B, s), np.int32)
  segment_BS[0, 11:] = 2
  segment_BS[0, 16:] = 3
  segment_BS[1, 5:] = 2
  segment_BS[1, -4:] = 0
  return jnp.asarray(segment_BS)


def written_out(q, k, v, segment, scale):
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, s, h in np.ndindex(q.shape[:3]):
    seen = [t for t in range(s + 1) if segment[b, t] == segment[b, s]]
    weight = np.exp([scale * q[b, s, h] @ k[b, t, h] for t in seen])
    out[b, s, h] = weight / weight.sum() @ v[b, seen, h]
  return out


def test_reference_equals_sums_written_out():
  q, k, v = make()
  segment = make_segments()
  o = attention(q, k, v, segment, segment, START, scale=SCALE, implementation='reference')
  np.testing.assert_allclose(o, written_out(q, k, v, np.asarray(segment), SCALE), atol=2e-6)


def test_visible_hides_the_future_and_other_documents():
  mask = visible(jnp.array([[1, 1, 2]]), jnp.array([[1, 1, 2]]), jnp.zeros(1, jnp.int32))
  np.testing.assert_array_equal(mask[0], [[1, 0, 0], [1, 1, 0], [0, 0, 1]])


def test_visible_counts_queries_from_their_start():
  ones = jnp.ones((2, 4), jnp.int32)
  mask = visible(ones[:, :2], ones, jnp.array([0, 2]))
  np.testing.assert_array_equal(mask[0], [[1, 0, 0, 0], [1, 1, 0, 0]])
  np.testing.assert_array_equal(mask[1], [[1, 1, 1, 0], [1, 1, 1, 1]])


def test_chunked_equals_reference_with_its_gradients():
  operands, segment = make(), make_segments()
  mask = visible(segment, segment, START)
  dout = jax.random.normal(jax.random.key(1), (B, S, H, V))
  whole = lambda q, k, v: reference.attention(q, k, v, mask, scale=SCALE)
  parts = lambda *operands: chunked.attention(
    *operands, segment, segment, START, scale=SCALE, block=8
  )[0]
  o, vjp = jax.vjp(whole, *operands)
  o_chunked, vjp_chunked = jax.vjp(jax.jit(parts), *operands)
  # the sums of one query are the same ones, in a matrix product of another size
  np.testing.assert_allclose(o_chunked, o, atol=1e-6)
  for found, expected in zip(vjp_chunked(dout), vjp(dout), strict=True):
    np.testing.assert_allclose(found, expected, atol=3e-6)


def test_chunked_counts_queries_from_their_start():
  q, k, v = make()
  ones = jnp.ones((B, S), jnp.int32)
  whole = attention(q, k, v, ones, ones, START, scale=SCALE)
  segments = ones[:, 16:], ones, START + 16
  tail, _ = chunked.attention(q[:, 16:], k, v, *segments, scale=SCALE, block=8)
  np.testing.assert_allclose(tail, whole[:, 16:], atol=1e-6)


def test_long_sequences_are_chunked_by_default(monkeypatch):
  monkeypatch.setattr(ops, '_BLOCK', 8)
  q, k, v = make()
  segment, calls = make_segments(), []
  whole = chunked.attention
  monkeypatch.setattr(chunked, 'attention', lambda *a, **kw: calls.append(kw) or whole(*a, **kw))
  attention(q, k, v, segment, segment, START, scale=SCALE)
  assert len(calls) == 1
  q, k, v = make(s=33)
  segment = make_segments(s=33)
  attention(q, k, v, segment, segment, START, scale=SCALE)
  assert len(calls) == 1  # not a multiple of the block


@pytest.mark.parametrize('implementation', ['reference', 'chunked'])
def test_another_document_changes_no_bit(monkeypatch, implementation):
  monkeypatch.setattr(ops, '_BLOCK', 8)
  segment = make_segments()

  def run(k, v):
    q = make()[0]
    return np.asarray(
      attention(q, k, v, segment, segment, START, scale=SCALE, implementation=implementation)
    )

  _, k, v = make()
  o = run(k, v)
  changed = run(k.at[0, 11:16].add(100.0), v.at[0, 11:16].add(100.0))
  own = np.zeros((B, S), bool)
  own[0, 11:16] = True
  np.testing.assert_array_equal(changed[~own], o[~own])
  assert (changed[own] != o[own]).all()


def test_named_chunks_refuse_a_length_that_is_no_multiple():
  q, k, v = make()
  segment = make_segments()
  with pytest.raises(NotImplementedError, match='multiple of 512 queries, not 32'):
    attention(q, k, v, segment, segment, START, scale=SCALE, implementation='chunked')


def test_cudnn_refuses_the_cpu_and_says_so():
  q, k, v = make()
  segment = make_segments()
  with pytest.raises(NotImplementedError, match='needs a GPU'):
    attention(q, k, v, segment, segment, START, scale=SCALE, implementation='cudnn')


def test_unknown_implementation_is_refused_with_the_known_ones():
  q, k, v = make()
  segment = make_segments()
  with pytest.raises(ValueError, match=r"'flash' is not one of reference, chunked"):
    attention(q, k, v, segment, segment, START, scale=SCALE, implementation='flash')


def test_probabilities_of_bfloat16_come_from_float32_scores():
  q, k, v = (a.astype(jnp.bfloat16) for a in make())
  segment = make_segments()
  o = attention(q, k, v, segment, segment, START, scale=SCALE)
  assert o.dtype == jnp.bfloat16
  exact = written_out(q, k, v, np.asarray(segment), SCALE)
  # p and o are rounded to 8 bits each: 2 * 2^-9 of values up to about 3
  np.testing.assert_allclose(o.astype(np.float32), exact, atol=2e-2)


def test_latent_attention_equals_attention_on_expanded_heads():
  R, N, W = 5, 4, 3  # latent, nope and rope widths
  keys = iter(jax.random.split(jax.random.key(0), 6))
  draw = lambda *shape: jax.random.normal(next(keys), shape)
  q_nope, q_rope = draw(B, S, H, N), draw(B, S, H, W)
  latent, rope = draw(B, S, R), draw(B, S, W)
  key_up, value_up = draw(R, H, N), draw(R, H, V)
  mask = visible(make_segments(), make_segments(), START)

  expanded = reference.attention(
    jnp.concatenate([q_nope, q_rope], -1),
    jnp.concatenate(
      [
        jnp.einsum('btr,rhn->bthn', latent, key_up),
        jnp.broadcast_to(rope[:, :, None], (B, S, H, W)),
      ],
      -1,
    ),
    jnp.einsum('btr,rhv->bthv', latent, value_up),
    mask,
    scale=SCALE,
  )
  absorbed = latent_attention(
    jnp.einsum('bshn,rhn->bshr', q_nope, key_up), q_rope, latent, rope, mask, scale=SCALE
  )
  np.testing.assert_allclose(jnp.einsum('bshr,rhv->bshv', absorbed, value_up), expanded, atol=2e-5)
