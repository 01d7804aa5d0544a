"""The Hopper kernels of V4's attention in the interpreter, with its race detector."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.compress import closed_windows
from moe_jax.ops.sink_attention import (
  compressed_attention,
  entries_visible,
  mosaic,
  reference,
  sink_attention,
  spans,
  visible,
  window_visible,
)
from tests.ops.documents import together

# H heads  C width, narrow to be quick: the kernels' own is 512
H, C, SCALE = 64, 64, 64**-0.5
# bfloat16 probabilities and sums; what the kernels are held to on the GPU
CLOSE = 5e-3


@pytest.fixture
def interpreter():
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()


@pytest.fixture(autouse=True)
def no_races(capfd):
  yield
  assert 'RACE DETECTED' not in ''.join(capfd.readouterr())


def operands(S, N, B):
  keys = jax.random.split(jax.random.key(0), 5)
  draw = lambda key, *shape: jax.random.normal(key, shape).astype(jnp.bfloat16)
  q, do = draw(keys[0], B, S, H, C), draw(keys[1], B, S, H, C)
  return q, draw(keys[2], B, S, C), draw(keys[3], B, N, C), jax.random.normal(keys[4], (H,)), do


def distance(got, want):
  got, want = (np.asarray(a, np.float64) for a in (got, want))
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def check(documents, *, window, ratio, slots=0, gradients=True):
  B, S = len(documents), max(sum(d) for d in documents)
  position_BS, segment_BS = together(documents, S)
  N = -(-S // ratio)
  seen = spans(position_BS, segment_BS, window=window, ratio=ratio)
  index_BSK = None
  if slots:
    # any entries that may be seen, best first, and anything behind them
    random = np.random.default_rng(0).random((B, S, N))
    _, mask = visible(seen, N)
    index_BSK = jnp.argsort(jnp.where(mask, random, 2.0), axis=-1)
    index_BSK = jnp.pad(index_BSK, ((0, 0), (0, 0), (0, slots)))[..., :slots]
  q, key, entry, sink, do = operands(S, N, B)

  def masked(q, key, entry, sink):
    mask = jnp.concatenate(visible(seen, N, index_BSK), axis=-1)
    both = jnp.concatenate([key, entry], axis=1)
    return sink_attention(q, both, sink, mask, scale=SCALE)[0]

  wide = [a.astype(jnp.float32) for a in (q, key, entry, sink)]
  want, pull = jax.vjp(masked, *wide)
  run = functools.partial(mosaic.attention, window=window, scale=SCALE, native=False)
  call = lambda q, key, entry, sink: run(q, key, entry, sink, seen, index_BSK)
  got, pull_got, lse = jax.vjp(call, q, key, entry, sink, has_aux=True)
  assert distance(got, want) < CLOSE
  mask = jnp.concatenate(visible(seen, N, index_BSK), axis=-1)
  both = jnp.concatenate(wide[1:3], axis=1)
  want_lse = reference.logsumexp(wide[0], both, sink, mask, scale=SCALE)
  np.testing.assert_allclose(lse, want_lse, atol=1e-4)
  if index_BSK is not None and gradients:
    got_mass = mosaic.mass(q, entry, lse, seen, index_BSK, scale=SCALE, native=False)
    want_mass = reference.chosen_mass(
      wide[0], wide[2], want_lse, index_BSK, seen.entry_count_BS, scale=SCALE
    )
    np.testing.assert_allclose(got_mass, want_mass, rtol=1e-3, atol=1e-4)
  if not gradients:
    return
  for a, b in zip(pull_got(do), pull(do.astype(jnp.float32)), strict=True):
    assert distance(a, b) < CLOSE


def test_outputs_of_a_window_and_chosen_entries(interpreter):
  check([[2]], window=2, ratio=1, slots=64, gradients=False)


@pytest.mark.slow
def test_chosen_entries(interpreter):
  check([[2, 1]], window=2, ratio=1, slots=64)


@pytest.mark.slow
@pytest.mark.parametrize('slots', (0, 64))
def test_rows_of_several_documents(interpreter, slots):
  # 70 keys cross a block's border; 3 tokens of padding
  check([[5, 1, 3], [70, 2]], window=67, ratio=2, slots=slots)


@pytest.mark.slow
def test_more_heads_than_one_block(interpreter, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], 'H', 128)
  check([[3]], window=2, ratio=2)


def test_spans_are_the_masks():
  position_BS, segment_BS = together([[7, 1, 4]], 14)
  index_BS = jnp.arange(14)[None]
  seen = spans(position_BS, segment_BS, window=3, ratio=2)
  windows = closed_windows(position_BS, segment_BS, ratio=2, num_entries=7)
  tokens, entries = visible(seen, 7)
  real = np.asarray(segment_BS[0]) > 0
  want = window_visible(index_BS, index_BS, segment_BS, segment_BS, window=3)
  np.testing.assert_array_equal(tokens[0, real], want[0, real])
  want = entries_visible(index_BS, windows.end_BN, segment_BS, windows.segment_BN)
  np.testing.assert_array_equal(entries, want)


def test_a_query_sees_only_the_entries_of_its_index():
  position_BS, segment_BS = together([[6]], 6)
  seen = spans(position_BS, segment_BS, window=3, ratio=1)
  _, entries = visible(seen, 6, jnp.array([[[0, 5]] * 5 + [[4, 2]]]))
  assert np.argwhere(entries[0]).tolist() == [
    [0, 0],
    [1, 0],
    [1, 5],
    *([t, e] for t in (2, 3, 4) for e in (0, 5)),
    [5, 2],
    [5, 4],
  ]


def test_the_kernel_says_why_it_cannot():
  q, key, entry, sink, _ = operands(4, 2, 1)
  position_BS, segment_BS = together([[4]], 4)
  seen = spans(position_BS, segment_BS, window=2, ratio=2)
  call = functools.partial(compressed_attention, q, key, entry, sink, seen, window=2, scale=1.0)
  with pytest.raises(NotImplementedError, match='mosaic: needs a Hopper GPU'):
    call(implementation='mosaic')
  o, lse = call()
  assert o.shape == q.shape and lse.shape == q.shape[:3]
