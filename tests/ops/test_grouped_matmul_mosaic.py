"""The Hopper kernels in the interpreter, with its race detector, against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.grouped_matmul import (
  grouped_matmul,
  mosaic_gpu,
  mosaic_rows,
  mosaic_weights,
  reference,
  tiles,
)
from moe_jax.ops.grouped_matmul.mosaic_common import strip_order
from moe_jax.ops.grouped_matmul.specs import LARGE, UGLY
from tests.ops.test_grouped_matmul import BFLOAT16, FLOAT32, close, operands

# Small, to have several of them, with a narrower last column and a ring shorter than the loop.
SMALL = tiles.Tile(m=128, n=128, stages=2, strip=2)
PAIR = dataclasses.replace(SMALL, n=64, pair=2)
TALL = dataclasses.replace(SMALL, m=256)


@pytest.fixture
def interpreter(monkeypatch):
  monkeypatch.setattr(mosaic_gpu, 'on_hopper', lambda: True)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()


@pytest.fixture(autouse=True)
def no_races(capfd):
  yield
  assert 'RACE DETECTED' not in ''.join(capfd.readouterr())


def exact(x_RD, w_EDF, dy_RF, starts, sizes_E):
  """Values and gradients of the reference, in float32 on the bfloat16 inputs."""
  wide = lambda a: a.astype(jnp.float32)
  call = lambda x, w: reference.forward(x, w, starts, sizes_E)
  y, pull = jax.vjp(call, wide(x_RD), wide(w_EDF))
  return y, *pull(wide(dy_RF))


def check(spec, tile, weights_tile):
  x_RD, w_EDF, dy_RF, sizes_E, _, starts = operands(spec, jnp.bfloat16)
  y, dx, dw = exact(x_RD, w_EDF, dy_RF, starts, sizes_E)
  groups = starts, sizes_E
  close(mosaic_gpu.forward(x_RD, w_EDF, *groups, tile=tile), y, BFLOAT16)
  close(mosaic_gpu.forward(dy_RF, w_EDF, *groups, transpose_w=True, tile=tile), dx, BFLOAT16)
  got = mosaic_gpu.weight_grad(x_RD, dy_RF, *groups, dtype=jnp.dtype('float32'), tile=weights_tile)
  close(got, dw, FLOAT32)


# three kernels take seconds each in the interpreter
QUICK = ('one_row', 'gaps_anywhere')
SOME = [pytest.param(s, marks=() if s.name in QUICK else pytest.mark.slow, id=s.name) for s in UGLY]


@pytest.mark.parametrize('spec', SOME)
def test_kernels_match_reference(interpreter, spec):
  check(spec, SMALL, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['not_a_multiple_of_the_tile', 'gaps_anywhere'])
def test_pairs_of_blocks_match_reference(interpreter, name):
  check(next(s for s in UGLY if s.name == name), PAIR, PAIR)


@pytest.mark.slow
def test_tall_tiles_match_reference(interpreter):
  spec = next(s for s in UGLY if s.name == 'rows_past_the_end')
  x_RD, w_EDF, _, sizes_E, _, starts = operands(spec, jnp.bfloat16)
  want = reference.forward(x_RD, w_EDF, starts, sizes_E)
  close(mosaic_gpu.forward(x_RD, w_EDF, starts, sizes_E, tile=TALL), want, BFLOAT16)


def test_bfloat16_weight_gradient_is_the_float32_one_rounded(interpreter):
  x_RD, _, dy_RF, sizes_E, _, starts = operands(UGLY[5], jnp.bfloat16)
  call = lambda dtype: mosaic_gpu.weight_grad(
    x_RD, dy_RF, starts, sizes_E, dtype=jnp.dtype(dtype), tile=SMALL
  )
  np.testing.assert_array_equal(call('bfloat16'), call('float32').astype(jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_weight_gradient_adds_into_an_array(interpreter, dtype):
  x_RD, w_EDF, dy_RF, sizes_E, _, starts = operands(UGLY[4], jnp.bfloat16)
  old_EDF = jnp.full(w_EDF.shape, 3, dtype)
  call = functools.partial(mosaic_gpu.weight_grad, x_RD, dy_RF, starts, sizes_E, tile=SMALL)
  got = jax.jit(lambda old: call(dtype=jnp.dtype(dtype), into_EDF=old))(old_EDF)
  want = call(dtype=jnp.dtype('float32')) + 3
  np.testing.assert_array_equal(got, want.astype(dtype))


@pytest.mark.slow
def test_op_runs_inside_shard_map_and_differentiates(interpreter):
  # one device: the interpreter keeps one shared memory for all of them
  mesh = jax.make_mesh((1,), ('expert',), devices=jax.devices()[:1])
  x_RD, w_EDF, _, sizes_E, _, _ = operands(UGLY[1], jnp.bfloat16)

  def loss(x, w, sizes, implementation):
    y = grouped_matmul(x, w, sizes, implementation=implementation)
    return jax.lax.psum((y.astype(jnp.float32) ** 2).mean(), 'expert')

  def grads(implementation):
    spec = P('expert')
    run = jax.shard_map(
      lambda *args: loss(*args, implementation), in_specs=(spec, P(), spec), out_specs=P()
    )
    with jax.set_mesh(mesh):
      args = jax.device_put(x_RD, spec), w_EDF, jax.device_put(sizes_E, spec)
      return jax.device_get(jax.jit(jax.grad(run, argnums=(0, 1)))(*args))

  close(grads('mosaic'), grads('xla'), BFLOAT16)


def test_unfit_shapes_are_refused_with_the_reason(monkeypatch):
  monkeypatch.setattr(mosaic_gpu, 'on_hopper', lambda: True)
  sizes = jnp.array([3, 5], jnp.int32)
  ask = lambda rows, d, f, dtype=jnp.bfloat16: grouped_matmul(
    jnp.zeros((rows, d), dtype), jnp.zeros((2, d, f), dtype), sizes, implementation='mosaic'
  )
  with pytest.raises(NotImplementedError, match='needs bfloat16 rows, got float32'):
    ask(8, 64, 64, jnp.float32)
  with pytest.raises(NotImplementedError, match=r'multiple of 8 rows .* got 12'):
    ask(12, 64, 64)
  with pytest.raises(NotImplementedError, match=r'multiples of 64 .* got 64 x 96'):
    ask(8, 64, 96)


@pytest.mark.parametrize('strip', [1, 3, 8])
def test_strips_visit_every_tile_once(strip):
  order = jax.vmap(lambda i: strip_order(i, 7, 5, strip))(jnp.arange(35))
  assert set(zip(*(a.tolist() for a in order), strict=True)) == {
    (row, column) for row in range(7) for column in range(5)
  }


@pytest.mark.parametrize('op', ['forward', 'dgrad', 'wgrad'])
def test_every_tile_that_can_be_chosen_fits(op):
  for spec in LARGE:
    for k, n in ((spec.d, spec.f), (spec.f, spec.d)):
      assert tiles.choose(op, spec.rows, k, n, len(spec.sizes)).fits(op)
      assert all(tile.fits(op) for tile in tiles.candidates(op, n))
  assert all(tiles.rule(n).fits(op) for n in (64, 128, 192, 256, 4096))


@pytest.mark.slow
@pytest.mark.parametrize('ugly', (4, 6, 8))
def test_rows_fetched_by_index_match_their_spread_copy(interpreter, ugly):
  spec = dataclasses.replace(UGLY[ugly], d=128, f=128)
  x_RD, w_EDF, dy_RF, sizes_E, _, starts = operands(spec, jnp.bfloat16)
  # rows of nobody name a token that is not there
  token_R = jnp.argsort(jax.random.normal(jax.random.key(1), spec.rows))[: spec.rows].astype(int)
  row = jnp.arange(spec.rows)[:, None]
  mine_R = ((row >= starts) & (row < starts + sizes_E)).any(1)
  named_R = jnp.where(mine_R, token_R, spec.rows)
  by_token = lambda a: jnp.zeros_like(a).at[token_R].set(jnp.where(mine_R[:, None], a, 0))
  work = mosaic_rows.plan(spec.rows, starts, sizes_E, SMALL.m)
  group_E4 = mosaic_weights.plan(spec.rows, starts, sizes_E, SMALL.k)
  plain = dict(tile=SMALL, dtype=jnp.dtype('float32'))
  named = dict(token_R=named_R, native=False)

  got = mosaic_rows.rows_matmul(by_token(x_RD), w_EDF, work, tile=SMALL, transpose_w=False, **named)
  want = mosaic_rows.rows_matmul(x_RD, w_EDF, work, tile=SMALL, transpose_w=False)
  np.testing.assert_array_equal(got, want)
  want = mosaic_weights.weights_matmul(x_RD, dy_RF, group_E4, **plain)
  x, dy = (by_token(x_RD), dy_RF), (x_RD, by_token(dy_RF))
  for gathers, pair in (('x', x), ('dy', dy)):
    got = mosaic_weights.weights_matmul(*pair, group_E4, gathers=gathers, **plain, **named)
    np.testing.assert_array_equal(got, want)
