"""What every sparse attention kind keeps: causality, documents apart, caches, meshes."""

import dataclasses

import jax
import numpy as np
import pytest
from kinds import KINDS, VOCABULARY, decoded, logits, logits_and_aux, on_mesh, tiny, where_of

from moe_jax import sharding as sh
from moe_jax.ops import nsa

# float32 sums in another order, logits of order 10
TOLERANCE = 1e-5
LENGTH = 23


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), jax.default_matmul_precision('highest'):
    yield


def draw_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length)).astype(np.int32)


@pytest.mark.parametrize('kind', KINDS)
def test_kind_never_reads_a_later_token(kind):
  cfg, ids = tiny(kind), draw_ids(1, LENGTH)
  variables = on_mesh(cfg)
  before = logits(cfg, variables, ids)
  for at in (1, 7, 16, LENGTH - 1):
    changed = ids.copy()
    changed[:, at:] = (changed[:, at:] + 1) % VOCABULARY
    after = logits(cfg, variables, changed)
    np.testing.assert_array_equal(after[:, :at], before[:, :at])
    assert np.abs(after[:, at] - before[:, at]).max() > 1e-3


@pytest.mark.parametrize('kind', KINDS)
def test_kind_computes_packed_documents_as_if_alone(kind):
  cfg, ids = tiny(kind), draw_ids(1, LENGTH)
  variables = on_mesh(cfg)
  lengths = (10, 2, 10)  # the last token is padding
  segment = np.zeros((1, LENGTH), np.int32)
  position = np.zeros((1, LENGTH), np.int32)
  starts = np.cumsum((0, *lengths))
  for i, (start, n) in enumerate(zip(starts, lengths, strict=False)):
    segment[:, start : start + n], position[:, start : start + n] = i + 1, np.arange(n)
  packed = logits(cfg, variables, ids, segment, position)
  assert np.isfinite(packed).all()
  for start, n in zip(starts, lengths, strict=False):
    alone = logits(cfg, variables, ids[:, start : start + n])
    np.testing.assert_allclose(packed[:, start : start + n], alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize('kind', KINDS)
def test_kind_decodes_what_the_full_forward_computes(kind):
  cfg, ids = tiny(kind), draw_ids(2, LENGTH)
  variables = on_mesh(cfg)
  full = logits(cfg, variables, ids)
  for written in decoded(cfg, variables, ids, prompts=[1, 6, 13], room=LENGTH + 3):
    np.testing.assert_allclose(written, full, atol=TOLERANCE, rtol=0)


def mean_nats(cfg, variables, ids):
  where = where_of(ids)

  def loss(params):
    out, aux = logits_and_aux(cfg, {**variables, 'params': params}, where)
    extra = sum(a.sum() for name, a in aux.items() if name.endswith('_loss'))
    score = jax.nn.log_softmax(out[:, :-1])
    target = jax.nn.one_hot(jax.sharding.reshard(where.token_BS, sh.TOKENS)[:, 1:], VOCABULARY)
    return -(score * target).sum(-1).mean() + extra

  return jax.jit(jax.value_and_grad(loss))(variables['params'])


@pytest.mark.parametrize('kind', KINDS)
def test_kind_gives_every_parameter_a_finite_gradient(kind):
  cfg = tiny(kind)
  loss, grads = mean_nats(cfg, on_mesh(cfg), draw_ids(2, LENGTH))
  assert np.isfinite(loss)
  for path, g in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(g).all(), path
    assert np.abs(g).max() > 0, path


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.slow
@pytest.mark.parametrize('shape', [(2, 2, 2), (1, 8, 1)], ids=str)
def test_kind_gives_the_same_loss_and_gradients_on_a_mesh(kind, shape):
  cfg, ids = tiny(kind), draw_ids(8, LENGTH)
  loss, grads = mean_nats(cfg, on_mesh(cfg), ids)
  with jax.set_mesh(sh.make_mesh(shape)):
    split_loss, split_grads = mean_nats(cfg, on_mesh(cfg), ids)
  np.testing.assert_allclose(split_loss, loss, atol=1e-5, rtol=0)
  # gradients of order 1, summed over devices in another order
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), split_grads, grads
  )


@pytest.mark.slow
def test_nsa_of_whole_rows_is_what_masks_compute(monkeypatch):
  sizes = dataclasses.replace(KINDS['nsa']['nsa'], d_head=16, d_value=16)
  cfg, ids = tiny('nsa', num_layers=1, num_dense_layers=1, nsa=sizes), draw_ids(2, LENGTH)
  want = mean_nats(cfg, on_mesh(cfg), ids)
  # interpreted; on a GPU they take bfloat16 only
  monkeypatch.setattr(nsa, 'unsupported', lambda *_: None)
  got = mean_nats(cfg, on_mesh(cfg), ids)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
