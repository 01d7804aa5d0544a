"""DeepSeek-V4's layers: documents, decoding, meshes, the indexer's gradient, sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.infer.decode import extend, open_session
from moe_jax.models.attention import compressed
from moe_jax.models.decoder import Decoder, empty_cache
from tests.models import tiny_v4

# float32, logits of order one, sums of a few dozen terms in another order
TOLERANCE = 1e-5
KINDS = ('sliding', 'csa', 'hca')


def _only(kind: str):
  return dataclasses.replace(tiny_v4.CONFIG, num_layers=1, attention_per_layer=(), attention=kind)


def _tokens(rows: int, length: int, seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 64, (rows, length))


@pytest.mark.parametrize('kind', KINDS)
def test_packed_documents_give_what_each_gives_alone(kind: str):
  lengths = (3, 17, 1, 10, 8)
  tokens = _tokens(1, sum(lengths) + 2)
  segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [[0, 0]])
  positions = np.concatenate([np.arange(n) for n in (*lengths, 2)])
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    model, variables = tiny_v4.make(_only(kind), rows=1)
    packed = tiny_v4.logits(
      model, variables, tiny_v4.place(tokens, positions[None], segments[None])
    )
    longest = max(lengths)
    for i, n in enumerate(lengths):
      begin = sum(lengths[:i])
      alone = np.zeros((1, longest), int)
      alone[:, :n] = tokens[:, begin : begin + n]
      got = tiny_v4.logits(model, variables, tiny_v4.whole(alone))
      np.testing.assert_allclose(packed[:, begin : begin + n], got[:, :n], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('prompt', 'by_runs'), ((3, False), (15, False), (15, True)))
def test_decoding_after_a_prompt_gives_the_full_forward(
  kind: str, prompt: int, by_runs: bool, monkeypatch
):
  tokens = _tokens(2, 27)
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    model, variables = tiny_v4.make(_only(kind))
    want = tiny_v4.logits(model, variables, tiny_v4.whole(tokens))
    if by_runs:
      # as on a GPU, whose kernel's stand-in here is the op's definition
      monkeypatch.setattr(compressed, 'unsupported', lambda *_: None)
    run = jax.jit(functools.partial(extend, model))
    session = open_session(model, rows=2, length=tokens.shape[1])
    pieces = [(0, prompt)] + [(prompt + i, prompt + i + 1) for i in range(27 - prompt)]
    for begin, end in pieces:
      token_BS = jax.device_put(tokens[:, begin:end].astype(np.int32), sh.TOKENS)
      got, session = run(variables, session, token_BS)
      np.testing.assert_allclose(got, want[:, begin:end], atol=TOLERANCE, rtol=0)


def test_later_tokens_do_not_change_earlier_ones():
  tokens = _tokens(2, 24)
  changed = tokens.copy()
  changed[:, 15] = (changed[:, 15] + 1) % 64
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    model, variables = tiny_v4.make()
    before = tiny_v4.logits(model, variables, tiny_v4.whole(tokens))
    after = tiny_v4.logits(model, variables, tiny_v4.whole(changed))
  np.testing.assert_array_equal(before[:, :15], after[:, :15])
  assert (before[:, 15:] != after[:, 15:]).any(-1).all()


@pytest.mark.parametrize('shape', ((2, 2, 2), (1, 8, 1)))
def test_a_mesh_of_eight_gives_what_one_device_gives(shape):
  tokens = _tokens(8, 16)
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    model, variables = tiny_v4.make(rows=8)
    want = tiny_v4.logits(model, variables, tiny_v4.whole(tokens))
    host = jax.tree.map(np.asarray, variables)
  with jax.set_mesh(sh.make_mesh(shape)):
    blank = tiny_v4.whole(tokens)
    shapes = jax.eval_shape(model.init, jax.random.key(0), blank)
    spread = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding.spec), host, shapes)
    got = tiny_v4.logits(model, spread, blank)
  np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def test_the_indexer_learns_from_its_loss_alone():
  tokens = _tokens(2, 24)
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    model, variables = tiny_v4.make()
    where = tiny_v4.whole(tokens)

    def loss(params, *, of_indexer: bool):
      out = model.apply({**variables, 'params': params}, where)
      return out.aux['indexer_loss'].sum() if of_indexer else jnp.square(out.hidden_BSD).sum()

    def moved(of_indexer: bool) -> dict[bool, list[bool]]:
      grads = jax.jit(jax.grad(functools.partial(loss, of_indexer=of_indexer)))(variables['params'])
      found: dict[bool, list[bool]] = {True: [], False: []}
      for path, g in jax.tree_util.tree_leaves_with_path(grads['group_1'] | grads['group_2']):
        found['indexer' in str(path)].append(bool(np.abs(g).max() > 0))
      return found

    by_index_loss, by_main_loss = moved(True), moved(False)
  assert all(by_index_loss[True]) and not any(by_index_loss[False])
  assert not any(by_main_loss[True]) and all(by_main_loss[False])


def test_a_cache_holds_the_window_and_the_entries():
  cfg = tiny_v4.COMPRESSED
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    short, long = (
      sum(a.size for a in jax.tree.leaves(
        empty_cache(_only(kind), batch=1, length=n, dtype=jnp.float32)
      ))
      for kind, n in (('csa', 800), ('csa', 1600))
    )  # fmt: skip
    sliding = empty_cache(_only('sliding'), batch=1, length=1600, dtype=jnp.float32)
  # 800 more tokens are 200 more entries of either width
  assert long - short == 200 * (cfg.d_head + cfg.d_index)
  assert sum(a.size for a in jax.tree.leaves(sliding)) == cfg.window * cfg.d_head


def test_intermediates_are_the_streams_entering_each_layer():
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    model, variables = tiny_v4.make()
    where = tiny_v4.whole(_tokens(2, 9))
    out = jax.jit(functools.partial(Decoder.apply, model, intermediates=True))(variables, where)
    entering = out.aux['entering']
  assert entering.shape == (4, 2, 9, 4, 32)
  embedding = np.asarray(variables['params']['embedding_VD'])[np.asarray(where.token_BS)]
  np.testing.assert_array_equal(entering[0], np.repeat(embedding[:, :, None], 4, axis=2))


def _by_runs_and_by_masks(kind: str, monkeypatch, of):
  """What `of` makes of a loss over whole rows: as masks compute it, and as a kernel would."""
  tokens = _tokens(1, 19)
  positions, segments = np.r_[0:11, 0:6, 0, 0], np.repeat([1, 2, 0], [11, 6, 2])
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    model, variables = tiny_v4.make(_only(kind), rows=1)
    where = tiny_v4.place(tokens, positions[None], segments[None])

    def loss(params):
      out = model.apply({**variables, 'params': params}, where)
      real_S1 = (segments > 0)[:, None]
      index_loss = out.aux.get('indexer_loss', jnp.float32(0))
      return jnp.square(out.hidden_BSD * real_S1).sum() + index_loss.sum()

    want = jax.jit(of(loss))(variables['params'])
    # the kernel's stand-in on a CPU is the op's definition, which takes runs as the kernel does
    monkeypatch.setattr(compressed, 'unsupported', lambda *_: None)
    got = jax.jit(of(loss))(variables['params'])
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + np.abs(b).max()))


def test_whole_rows_by_runs_are_whole_rows_by_masks(monkeypatch):
  _by_runs_and_by_masks('csa', monkeypatch, lambda loss: loss)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_gradients_by_runs_are_those_by_masks(kind: str, monkeypatch):
  _by_runs_and_by_masks(kind, monkeypatch, jax.value_and_grad)
