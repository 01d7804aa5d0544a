"""Sparse MLA and the indexer's choice and losses against masks over all pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.attention import latent_attention
from moe_jax.ops.indexer import (
  attention_target,
  dense_index_loss,
  index_loss,
  index_scores,
  loss,
  select,
  select_keys,
  sparse_index_loss,
  top_k_mask,
)
from moe_jax.ops.sparse_mla import key_mass, sparse_mla, xla

# S queries and keys  H heads  V latent width  C rope width  J index heads  I index width
S, H, V, C, J, I, K, SCALE = 24, 2, 8, 4, 8, 4, 5, 0.3
SEGMENT = jnp.asarray([1] * 10 + [2] * 3 + [3] * 9 + [0] * 2)
FIRST = jnp.asarray([0] * 10 + [10] * 3 + [13] * 9 + [22] * 2)
END = jnp.arange(1, S + 1)
MASK = (jnp.arange(S) >= FIRST[:, None]) & (jnp.arange(S) < END[:, None])


def draw(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


INDEXER: tuple[jax.Array, jax.Array, jax.Array] = draw(S, J, I), draw(S, I), draw(S, J, seed=1)
MAIN: tuple[jax.Array, jax.Array, jax.Array, jax.Array] = (
  draw(S, H, V),
  draw(S, H, C),
  draw(S, V),
  draw(S, C),
)


@pytest.fixture(autouse=True)
def exact_products():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture
def small_chunks(monkeypatch):
  for module in (loss, select, xla):
    monkeypatch.setattr(module, '_CHUNK_ELEMENTS', 4 * S * J)


def all_scores(indexer):
  q, k, weight = indexer
  return index_scores(q[None], k[None], weight[None])


def chosen_mask(score=None):
  score = all_scores(INDEXER)[0] if score is None else score
  return top_k_mask(score, MASK, k=K)


def assert_marks(mask, index, count):
  mask, index, count = map(np.asarray, (mask, index, count))
  for row, keys, n in zip(mask, index, count, strict=True):
    assert keys[:n].tolist() == np.flatnonzero(row).tolist()
    assert not keys[n:].any()


def assert_same_gradients(got, exact, args):
  at = tuple(range(len(args)))
  for a, b in zip(
    jax.tree.leaves(jax.jit(jax.value_and_grad(got, at))(*args)),
    jax.tree.leaves(jax.jit(jax.value_and_grad(exact, at))(*args)),
    strict=True,
  ):
    # float32 sums of tens of terms of order 1, in another order
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_select_keys_names_what_the_mask_marks(small_chunks):
  index, count = select_keys(*INDEXER, FIRST, END, k=K)
  assert_marks(chosen_mask(), index, count)


def test_select_keys_takes_the_earliest_of_equal_scores():
  ones = jnp.ones
  index, count = select_keys(ones((S, J, I)), ones((S, I)), ones((S, J)), FIRST, END, k=3)
  assert index[9].tolist() == [0, 1, 2] and index[20].tolist() == [13, 14, 15]
  assert count.tolist()[:4] == [1, 2, 3, 3]


def test_select_keys_in_float8_chooses_by_rounded_products():
  index, count = select_keys(*INDEXER, FIRST, END, k=K, fp8=True)
  rounded = lambda a: select.quantize(a)[0].astype(jnp.float32) * select.quantize(a)[1][..., None]
  q, k, weight = INDEXER
  mask = chosen_mask(index_scores(rounded(q)[None], rounded(k)[None], weight[None])[0])
  assert_marks(mask, index, count)


def test_sparse_mla_equals_masked_attention_values_and_gradients(small_chunks):
  index, count = select_keys(*INDEXER, FIRST, END, k=K)
  mask = chosen_mask()
  seed = draw(S, H, V, seed=3)
  call = functools.partial(sparse_mla, index_TK=index, count_T=count, scale=SCALE)
  sparse = lambda *a: (call(*a)[0] * seed).sum()

  def dense(q, q_rope, latent, rope):
    q, q_rope, latent, rope = (a[None] for a in (q, q_rope, latent, rope))
    return (latent_attention(q, q_rope, latent, rope, mask[None], scale=SCALE)[0] * seed).sum()

  assert_same_gradients(sparse, dense, MAIN)


def test_sparse_mla_of_no_key_is_zero_and_has_finite_gradients():
  count = jnp.zeros(S, jnp.int32).at[3].set(2)
  index = jnp.zeros((S, K), jnp.int32).at[:, 1].set(1)
  call = functools.partial(sparse_mla, index_TK=index, count_T=count, scale=1.0)
  o, lse = call(*MAIN)
  assert not o[0].any() and (lse[0] == -1e30).all() and o[3].any()
  grads = jax.grad(lambda *a: call(*a)[0].sum(), (0, 1, 2, 3))(*MAIN)
  assert all(np.isfinite(g).all() for g in grads)


def test_sparse_mla_of_no_query_is_empty():
  none = jnp.zeros((0, K), jnp.int32)
  o, lse = sparse_mla(MAIN[0][:0], MAIN[1][:0], MAIN[2], MAIN[3], none, none[:, 0], scale=1.0)
  assert o.shape == (0, H, V) and lse.shape == (0, H)


def test_sparse_mla_names_what_its_kernels_refuse():
  index, count = select_keys(*INDEXER, FIRST, END, k=K)
  with pytest.raises(NotImplementedError, match='mosaic: needs a Hopper GPU'):
    sparse_mla(*MAIN, index, count, scale=SCALE, implementation='mosaic')
  with pytest.raises(NotImplementedError, match='kernels: needs a Hopper GPU'):
    select_keys(*INDEXER, FIRST, END, k=K, implementation='kernels')


def queries_and_keys():
  q, q_rope, latent, rope = MAIN
  spread = lambda a: jnp.broadcast_to(a[:, None], (S, H, a.shape[-1]))
  return (
    jnp.concatenate([q, q_rope], -1),
    jnp.concatenate([spread(latent), spread(rope)], -1),
  )


def test_sparse_index_loss_equals_the_masked_one_with_gradients(small_chunks):
  index, count = select_keys(*INDEXER, FIRST, END, k=K)
  valid = SEGMENT > 0
  _, lse = sparse_mla(*MAIN, index, count, scale=SCALE)
  target = key_mass(*MAIN, index, count, lse, scale=SCALE) / H
  mask = chosen_mask()
  q, k = queries_and_keys()
  dense_target = attention_target(q[None], k[None], mask[None], scale=SCALE)

  def sparse(index_q, index_k, weight):
    importance = valid / valid.sum()
    return 3 * sparse_index_loss(index_q, index_k, weight, index, count, target, importance)

  def dense(*indexer):
    score = all_scores(indexer)
    return 3 * index_loss(dense_target, score, mask[None], valid[None])

  assert_same_gradients(sparse, dense, INDEXER)


def test_dense_index_loss_in_chunks_equals_the_masked_one_with_gradients(small_chunks):
  valid = SEGMENT > 0
  q, k = queries_and_keys()
  target = attention_target(q[None], k[None], MASK[None], scale=SCALE)

  def chunked(index_q, index_k, weight):
    importance = valid / valid.sum()
    return dense_index_loss(index_q, index_k, weight, q, k, SEGMENT, importance, scale=SCALE)

  def dense(*indexer):
    score = all_scores(indexer)
    return index_loss(target, score, MASK[None], valid[None])

  assert_same_gradients(chunked, dense, INDEXER)
