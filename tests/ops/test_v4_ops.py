"""The ideas of DeepSeek-V4, each against a few lines of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.compress import closed_windows, compress
from moe_jax.ops.entry_index import (
  choose,
  chosen_scores,
  entry_scores,
  index_loss,
  select_top_k,
)
from moe_jax.ops.hyper_connections import sinkhorn
from moe_jax.ops.rope import frequencies, rotate_last
from moe_jax.ops.route import hash_table, scores
from moe_jax.ops.sink_attention import entries_visible, sink_attention, window_visible
from moe_jax.ops.swiglu import swiglu

RANDOM = np.random.default_rng(0)


def test_sinkhorn_makes_columns_sum_to_one_and_rows_nearly():
  m_JK = sinkhorn(RANDOM.standard_normal((50, 4, 4)), iterations=20, eps=1e-6)
  np.testing.assert_allclose(m_JK.sum(-2), 1, atol=1e-5)
  # the published behaviour: the last step normalises columns
  np.testing.assert_allclose(m_JK.sum(-1), 1, atol=0.1)


@pytest.mark.parametrize('overlap', (False, True))
def test_compress_is_a_softmax_over_each_window_of_each_document(overlap):
  M, C, lengths = 3, 4, (7, 2, 8)
  X, T = C * (2 if overlap else 1), sum(lengths)
  content_TX, gate_TX = RANDOM.standard_normal((2, T, X)).astype(np.float32)
  bias_MX = RANDOM.standard_normal((M, X)).astype(np.float32)
  position_T = np.concatenate([np.arange(n) for n in lengths])
  segment_T = np.repeat([1, 2, 3], lengths)
  windows = closed_windows(position_T[None], segment_T[None], ratio=M, num_entries=T // M + 1)
  got_NC = compress(content_TX[None], gate_TX[None], bias_MX, windows, overlap=overlap)[0]
  want, ends = [], []
  for begin, n in zip(np.cumsum((0, *lengths)), lengths, strict=False):
    for i in range(n // M):
      own = slice(begin + i * M, begin + i * M + M)
      c, g = content_TX[own, -C:], gate_TX[own, -C:] + bias_MX[:, -C:]
      if overlap and i:
        before = slice(own.start - M, own.start)
        c = np.concatenate([content_TX[before, :C], c])
        g = np.concatenate([gate_TX[before, :C] + bias_MX[:, :C], g])
      p = np.exp(g) / np.exp(g).sum(0)
      want.append((p * c).sum(0))
      ends.append(own.stop - 1)
  live_N = np.asarray(windows.live_BN[0])
  assert np.asarray(windows.end_BN[0])[live_N].tolist() == ends
  assert np.isfinite(got_NC).all()
  np.testing.assert_allclose(np.asarray(got_NC)[live_N], want, atol=1e-6)


def test_entries_are_visible_once_their_window_has_closed():
  segment_BS = np.array([[1] * 5 + [2] * 5])
  seen = entries_visible(
    np.arange(10)[None], np.array([[3, 8, 9]]), segment_BS, np.array([[1, 2, 0]])
  )
  assert np.asarray(seen[0, :, 0]).nonzero()[0].tolist() == [3, 4]
  assert np.asarray(seen[0, :, 1]).nonzero()[0].tolist() == [8, 9]
  assert not seen[0, :, 2].any()


def test_the_window_ends_at_the_border_of_a_document():
  segment_BS, index_BS = np.array([[1] * 4 + [2] * 3]), np.arange(7)[None]
  seen = window_visible(index_BS, index_BS, segment_BS, segment_BS, window=3)
  assert np.asarray(seen[0].sum(-1)).tolist() == [1, 2, 3, 3, 1, 2, 3]


def test_the_sink_takes_its_share_of_the_softmax():
  q, key = RANDOM.standard_normal((1, 2, 3, 4)), RANDOM.standard_normal((1, 5, 4))
  sink_H = np.array([0.3, -2.0, 40.0])
  visible_BST = np.array([[[1, 1, 0, 0, 1], [0, 0, 1, 0, 0]]], bool)
  o, mass = sink_attention(*map(jnp.asarray, (q, key, sink_H, visible_BST)), scale=0.5)
  e = np.exp(0.5 * np.einsum('bshc,btc->bhst', q, key)) * visible_BST[:, None]
  p = e / (e.sum(-1, keepdims=True) + np.exp(sink_H)[:, None, None])
  np.testing.assert_allclose(o, np.einsum('bhst,btc->bshc', p, key), atol=1e-6)
  np.testing.assert_allclose(mass, p.sum(1), atol=1e-6)


def test_select_top_k_takes_the_first_of_equals_and_nothing_invisible():
  score = jnp.array([[[1.0, 3.0, 2.0, 2.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
  visible = jnp.array([[[1, 1, 1, 1, 0], [0, 1, 0, 0, 0]]], bool)
  picked = select_top_k(score, visible, k=2)
  assert picked.astype(int).tolist() == [[[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]]


def test_chosen_entries_are_those_of_the_mask_and_so_are_their_scores_and_gradients():
  B, S, N, H, C, K = 2, 7, 6, 8, 4, 3
  q, k = (jnp.asarray(RANDOM.standard_normal(s), jnp.float32) for s in ((B, S, H, C), (B, N, C)))
  weight = jnp.asarray(RANDOM.standard_normal((B, S, H)), jnp.float32)
  first = jnp.array([[0, 0, 0, 0, 2, 2, 2]] * B)
  count = jnp.array([[0, 1, 2, 5, 4, 4, 0]] * B)
  index = choose(q, k, weight, first, count, k=K)
  visible = (jnp.arange(N) >= first[..., None]) & (jnp.arange(N) < (first + count)[..., None])
  mask = select_top_k(entry_scores(q, k, weight), visible, k=K)
  used = jnp.arange(K) < count[..., None]
  named = jax.nn.one_hot(jnp.where(used, index, N), N).any(2)
  np.testing.assert_array_equal(named, mask)
  factor = jnp.where(used, 1.0 + jnp.arange(K), 0)
  by_index = lambda *a: (chosen_scores(*a, index) * factor).sum()
  at = lambda a: jnp.take_along_axis(entry_scores(*a), index, axis=-1)
  by_mask = lambda *a: (at(a) * factor).sum()
  got = jax.value_and_grad(by_index, argnums=(0, 1, 2))(q, k, weight)
  want = jax.value_and_grad(by_mask, argnums=(0, 1, 2))(q, k, weight)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_index_loss_is_zero_where_scores_are_the_log_of_the_attention():
  mass = jnp.asarray(RANDOM.random((1, 3, 4)))
  picked = jnp.array([[[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]], bool)
  valid = jnp.ones((1, 3), bool)
  assert abs(index_loss(jnp.log(mass) + 5, mass, picked, valid)) < 1e-6
  loss, grad = jax.value_and_grad(index_loss)(jnp.zeros((1, 3, 4)), mass, picked, valid)
  assert loss > 0 and not np.asarray(grad)[~np.asarray(picked)].any()


@pytest.mark.parametrize(('V', 'K', 'E'), ((1000, 6, 256), (97, 2, 8), (50, 6, 16), (10, 3, 3)))
def test_hash_table_gives_distinct_experts_evenly(V, K, E):
  table_VK = np.asarray(hash_table(jax.random.key(3), num_ids=V, top_k=K, num_experts=E))
  assert table_VK.shape == (V, K)
  assert all(len(set(row)) == K for row in table_VK.tolist())
  counts = np.bincount(table_VK.ravel(), minlength=E)
  assert counts.max() - counts.min() <= 1


def test_swiglu_limit_clamps_the_gate_above_and_up_on_both_sides():
  silu = lambda x: x / (1 + np.exp(-x))
  gate, up = np.array([-5.0, 0.1, 5.0, 5.0]), np.array([-5.0, 0.1, 5.0, -5.0])
  want = [silu(-5.0) * -0.3, silu(0.1) * 0.1, silu(0.3) * 0.3, silu(0.3) * -0.3]
  np.testing.assert_allclose(swiglu(gate, up, limit=0.3), want, rtol=1e-6)


def test_sqrt_softplus_is_the_root_of_log_one_plus_exp():
  x = np.linspace(-10, 10, 9)
  np.testing.assert_allclose(scores(x, 'sqrt_softplus'), np.sqrt(np.log1p(np.exp(x))), rtol=1e-5)


def test_rotate_last_turns_the_last_channels_and_turns_back():
  x = RANDOM.standard_normal((1, 6, 2, 10)).astype(np.float32)
  position, freq = np.arange(6)[None], frequencies(4, base=100.0)
  turned = rotate_last(x, position, freq)
  np.testing.assert_array_equal(turned[..., :6], x[..., :6])
  assert not np.allclose(turned[:, 1:, :, 6:], x[:, 1:, :, 6:])
  np.testing.assert_allclose(rotate_last(turned, -position, freq), x, atol=1e-6)
