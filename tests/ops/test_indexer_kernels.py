"""The indexer's kernels in their interpreters: scores with the race detector, and the top-k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.indexer import (
  index_scores,
  loss,
  mosaic_scores,
  select,
  top_k_mask,
  triton_top_k,
)

# T queries  J index heads  I index width  S keys


@pytest.fixture
def interpreter(capfd):
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()
  assert 'RACE DETECTED' not in ''.join(capfd.readouterr())


def draw(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize('fp8', [False, True])
def test_scores_match_reference_within_each_query_s_keys(interpreter, fp8):
  q, k, weight = draw(6, 64, 128), draw(200, 128), draw(6, 64)
  first = jnp.array([0, 0, 3, 130, 140, 150], jnp.int32)
  end = jnp.array([5, 20, 3, 140, 160, 200], jnp.int32)
  if fp8:
    (q, q_scale), (k, k_scale) = select.quantize(q), select.quantize(k)
  else:
    q, k, q_scale, k_scale = *(a.astype(jnp.bfloat16) for a in (q, k)), jnp.ones(()), None
  got = mosaic_scores.scores(q, k, weight * 128**-0.5 * q_scale, k_scale, first, end)
  scaled = lambda a, scale: a.astype(jnp.float32) * (1 if scale is None else scale[..., None])
  exact = index_scores(scaled(q, q_scale)[None], scaled(k, k_scale)[None], weight[None])[0]
  for row in range(6):
    at = slice(int(first[row]), int(end[row]))
    np.testing.assert_allclose(got[row, at], exact[row, at], atol=1e-4)


@pytest.mark.parametrize(('num_keys', 'k', 'piece'), [(40, 8, 64), (100, 8, 32), (64, 16, 64)])
def test_top_k_is_exact_in_pieces_with_ties_and_few_keys(num_keys, k, piece):
  rows = 9
  rng = np.random.default_rng(num_keys)
  score = jnp.round(draw(rows, num_keys) * 3) / 2 * jnp.array([1.0, -1.0])[num_keys % 2]
  first = rng.integers(0, 5, rows).astype(np.int32)
  end = rng.integers(5, num_keys + 1, rows).astype(np.int32)
  end[0] = first[0] + k
  allowed = (np.arange(num_keys) >= first[:, None]) & (np.arange(num_keys) < end[:, None])
  expected = np.asarray(top_k_mask(score, jnp.asarray(allowed), k=k))
  place = triton_top_k.top_k(
    score, jnp.asarray(first), jnp.asarray(end), k=k, piece=piece, step=16, interpret=True
  )
  for row, at in enumerate(np.asarray(place)):
    n = min(k, end[row] - first[row])
    assert at[:n].tolist() == np.flatnonzero(expected[row]).tolist()
    assert not at[n:].any()


@pytest.mark.slow
def test_loss_kernel_equals_xla_in_value_and_gradients(monkeypatch):
  monkeypatch.setattr(loss.triton_loss, 'unsupported', lambda *_: None)
  rows, keys, heads, width, k = 4, 90, 16, 32, 70
  q, key, weight = draw(rows, heads, width), draw(keys, width), draw(rows, heads)
  rng = np.random.default_rng(0)
  index = np.stack([np.sort(rng.permutation(keys)[:k]) for _ in range(rows)]).astype(np.int32)
  count = np.array([0, 1, 64, 70], np.int32)
  target = rng.random((rows, k)) * (np.arange(k) < count[:, None])
  target[2, 5] = 0
  target = (target / np.maximum(target.sum(1, keepdims=True), 1e-9)).astype(np.float32)
  share = rng.random(rows).astype(np.float32)

  def run(implementation):
    call = lambda *learned: loss.sparse_index_loss(
      *learned, index, count, target, share, implementation=implementation
    )
    return jax.jit(jax.value_and_grad(call, (0, 1, 2)))(q, key, weight)

  # float32 sums in another order
  for got, exact in zip(*(jax.tree.leaves(run(by)) for by in ('triton', 'xla')), strict=True):
    np.testing.assert_allclose(got, exact, atol=1e-5 * float(jnp.abs(exact).max()))
