"""The Hopper kernels of sparse MLA in the interpreter, with its race detector."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.sparse_mla import mosaic, reference
from moe_jax.ops.sparse_mla.mosaic_forward import Keys

# T queries  H heads  V latent width  C rope width  S keys  K slots
V, C, S, K, SCALE = 128, 64, 96, 128, 0.1
BFLOAT16 = 5e-3


@pytest.fixture
def interpreter():
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()


@pytest.fixture(autouse=True)
def no_races(capfd):
  yield
  assert 'RACE DETECTED' not in ''.join(capfd.readouterr())


def draw(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


def choose(counts, num_keys=S, num_slots=K):
  """Distinct keys for each query, at most as many as there are; what is unused is key 0."""
  rng = np.random.default_rng(0)
  index = np.zeros((len(counts), num_slots), np.int32)
  for row, count in zip(index, counts, strict=True):
    row[:count] = rng.permutation(num_keys)[:count]
  return jnp.asarray(index), jnp.asarray(counts, jnp.int32)


def close(got, exact, tolerance=BFLOAT16):
  got, exact = (np.asarray(a, np.float64) for a in (got, exact))
  assert np.linalg.norm(got - exact) <= tolerance * np.linalg.norm(exact)


def wide(*arrays) -> Any:
  return tuple(a.astype(jnp.float32) for a in arrays)


def exactly(index, count):
  return functools.partial(reference.sparse_mla, index_TK=index, count_T=count, scale=SCALE)


def test_forward_of_one_block_matches_reference(interpreter):
  q, q_rope, latent, rope = draw(1, 8, V), draw(1, 8, C), draw(S, V), draw(S, C)
  index, count = choose([37], num_slots=64)
  o, _ = mosaic.forward(q, q_rope, Keys(latent, rope, index, count), scale=SCALE, native=False)
  close(o, exactly(index, count)(*wide(q, q_rope, latent, rope))[0])


@pytest.mark.slow
def test_forward_matches_reference_with_uneven_counts(interpreter):
  q, q_rope, latent, rope = draw(3, 16, V), draw(3, 16, C), draw(S, V), draw(S, C)
  index, count = choose([90, 0, 37])
  o, lse = mosaic.forward(q, q_rope, Keys(latent, rope, index, count), scale=SCALE, native=False)
  exact = exactly(index, count)(*wide(q, q_rope, latent, rope))
  close(o, exact[0])
  np.testing.assert_allclose(lse, exact[1], rtol=1e-5)


@pytest.mark.slow
def test_backward_matches_autodiff_of_the_reference(interpreter):
  q, q_rope, latent, rope = draw(3, 16, V), draw(3, 16, C), draw(S, V), draw(S, C)
  do, dlse = draw(3, 16, V, seed=1), wide(draw(3, 16, seed=2))[0]
  index, count = choose([90, 0, 37])
  (o, lse), pull = jax.vjp(exactly(index, count), *wide(q, q_rope, latent, rope))
  delta = (o * wide(do)[0]).sum(-1) - dlse
  got = mosaic.backward(
    q, q_rope, Keys(latent, rope, index, count), lse, delta, do, scale=SCALE, chunk=1, native=False
  )
  for grad, exact in zip(got, pull((*wide(do), dlse)), strict=True):
    close(grad, exact)


@pytest.mark.slow
@pytest.mark.parametrize('heads', [8, 128])
def test_consecutive_keys_in_parts_match_reference(interpreter, heads):
  """A run of keys for each part of a query; with 128 heads the blocks of a pair share loads."""
  q, q_rope, latent, rope = draw(1, heads, V), draw(1, heads, C), draw(S, V), draw(S, C)
  first, count = jnp.array([8, 40], jnp.int32), jnp.array([70, 5], jnp.int32)
  o, lse = mosaic.forward(
    q, q_rope, Keys(latent, rope, first, count), scale=SCALE, splits=2, native=False
  )
  index = jnp.minimum(first[:, None] + jnp.arange(K), S - 1)
  both = wide(*(jnp.repeat(a, 2, axis=0) for a in (q, q_rope)), latent, rope)
  exact = exactly(index, count)(*both)
  close(o, exact[0])
  np.testing.assert_allclose(lse, exact[1], rtol=1e-5)


@pytest.mark.slow
def test_mass_matches_reference(interpreter):
  q, q_rope, latent, rope = draw(3, 16, V), draw(3, 16, C), draw(S, V), draw(S, C)
  index, count = choose([90, 0, 37])
  args: Any = *wide(q, q_rope, latent, rope), index, count
  _, lse = exactly(index, count)(*args[:4])
  keys = Keys(latent, rope, index, count)
  got = mosaic.key_mass(q, q_rope, keys, lse, scale=SCALE, native=False)
  exact = reference.key_mass(*args, lse, scale=SCALE)
  for row in (0, 2):
    n = int(count[row])
    np.testing.assert_allclose(got[row, :n], exact[row, :n], rtol=1e-5)
