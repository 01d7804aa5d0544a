"""Attention over a cache of latents: its parts join to the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops import decode_attention as ops
from moe_jax.ops.decode_attention import compressed
from moe_jax.ops.decode_attention.parts import num_parts
from moe_jax.ops.sink_attention import Spans
from moe_jax.ops.sparse_mla import mosaic, reference

# B rows  S new tokens  H heads  V latent width  C rope width  T places
B, S, H, V, C, T = 2, 3, 2, 8, 4, 1024
START = jnp.array([5, 1000], jnp.int32)


@pytest.fixture
def written_out(monkeypatch):
  """The kernel's contract, by the reference: consecutive or named rows for every part."""

  def forward(q, q_rope, keys, *, scale, splits):
    row, count = keys.row, keys.count_N
    if row.ndim == 1:
      row = jnp.minimum(row[:, None] + jnp.arange(T), len(keys.latent_SV) - 1)
    q, q_rope = (jnp.repeat(a, splits, axis=0) for a in (q, q_rope))
    return reference.sparse_mla(q, q_rope, keys.latent_SV, keys.rope_SC, row, count, scale=scale)

  monkeypatch.setattr(mosaic, 'unsupported', lambda *_: None)
  monkeypatch.setattr(mosaic, 'forward', forward)


def draw(*shape):
  rng = np.random.default_rng(list(shape))
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def operands():
  return draw(B, S, H, V), draw(B, S, H, C), draw(B, T, V), draw(B, T, C)


def test_parts_of_a_cache_join_to_the_whole(written_out):
  q, q_rope, latent, rope = operands()
  assert num_parts(B * S, H, T) == 4
  call = functools.partial(ops.decode_attention, q, q_rope, latent, rope, START, scale=0.3)
  np.testing.assert_allclose(
    call(implementation='mosaic'), call(implementation='reference'), atol=1e-5
  )


def test_parts_of_chosen_places_join_to_the_whole(written_out):
  q, q_rope, latent, rope = operands()
  index = jnp.argsort(draw(B, S, T), axis=-1)[..., :600].astype(jnp.int32)
  count = jnp.array([[600, 3, 0], [300, 512, 511]], jnp.int32)
  call = functools.partial(
    ops.sparse_decode_attention, q, q_rope, latent, rope, index, count, scale=0.3
  )
  assert num_parts(B * S, H, 600) == 2
  np.testing.assert_allclose(
    call(implementation='mosaic'), call(implementation='reference'), atol=1e-5
  )


def test_decode_attention_names_what_its_kernel_refuses(monkeypatch):
  q, q_rope, latent, rope = operands()
  call = functools.partial(ops.decode_attention, scale=0.3, implementation='mosaic')
  with pytest.raises(NotImplementedError, match='mosaic: needs a Hopper GPU'):
    call(q, q_rope, latent, rope, START)
  monkeypatch.setattr(mosaic, 'unsupported', lambda *_: None)
  with pytest.raises(NotImplementedError, match='multiple of 8 places, got 1020'):
    call(q, q_rope, latent[:, :1020], rope[:, :1020], START)
  assert jax.eval_shape(functools.partial(call, implementation=None), q, q_rope, latent[:, :1020],
    rope[:, :1020], START).shape == q.shape  # fmt: skip


@pytest.mark.parametrize(
  ('entries', 'slots', 'parts'),
  [
    (0, 0, 1),
    pytest.param(150, 0, 2, marks=pytest.mark.slow),
    pytest.param(40, 0, 1, marks=pytest.mark.slow),
    pytest.param(150, 128, 2, marks=pytest.mark.slow),
  ],
)
def test_a_window_and_entries_join_with_the_sink(monkeypatch, capfd, entries, slots, parts):
  """By V4's kernel in the interpreter; its own width is 512."""
  heads, width, places = 64, 64, 9
  monkeypatch.setattr(compressed, 'num_parts', lambda *_: parts)
  narrow = lambda *shape: draw(*shape).astype(jnp.bfloat16)
  q, key, entry = narrow(2, 1, heads, width), narrow(2, places, width), narrow(2, entries, width)
  sink = draw(heads)
  column = lambda *values: jnp.array(values, jnp.int32)[:, None]
  # the second row sees no entry yet
  seen = Spans(column(2, 0), column(7, 1), column(0, 0), column(min(entries, 131), 0))
  index = None
  if slots:
    index = jnp.argsort(draw(2, 1, entries), axis=-1)[..., :slots].astype(jnp.int32)
    seen = seen._replace(entry_count_BS=column(100, 0))
  call = functools.partial(ops.compressed_decode_attention, scale=0.1)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    got = call(q, key, entry, sink, seen, index, native=False)
  interpret_pallas_call.reset_gpu_interpret_mode_state()
  wide = [a.astype(jnp.float32) for a in (q, key, entry)]
  want = call(wide[0], wide[1], wide[2], sink, seen, index, implementation='reference')
  distance = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
  # probabilities and results are rounded to 8 bits
  assert distance < 5e-3
  assert 'RACE DETECTED' not in ''.join(capfd.readouterr())
