"""Routed experts on one device and on meshes, against a loop over tokens."""

# B batch  S sequence  D model  F width  E experts  K experts a token

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_jax import sharding as sh
from moe_jax.ops import quantize as qz
from moe_jax.ops.experts import expert_mlp
from moe_jax.ops.experts.local import local_experts
from moe_jax.ops.recipe import Product, Recipe

B, S, D, F, E, K = 8, 4, 8, 6, 8, 3


def routes(name: str) -> np.ndarray:
  rng = np.random.default_rng(0)
  draw = lambda experts: np.stack([rng.permutation(experts)[:K] for _ in range(B * S)])
  match name:
    case 'mixed':
      expert = draw(np.arange(E))
    case 'one_without_tokens':
      expert = draw(np.delete(np.arange(E), 2))
    case 'all_to_the_same':
      expert = np.tile([5, 3, 0], (B * S, 1))
    case 'all_to_one_half':  # one device of two gets everything
      expert = np.tile([6, 7, 4], (B * S, 1))
    case _:
      raise ValueError(name)
  return expert.reshape(B, S, K).astype(np.int32)


NAMES = ('mixed', 'all_to_the_same', 'one_without_tokens', 'all_to_one_half')


def operands(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, *shape: jax.random.normal(key, shape)
  x, weight = draw(keys[0], B, S, D), jax.nn.softmax(draw(keys[1], B, S, K))
  matrices = draw(keys[2], E, D, 2, F), draw(keys[3], E, F, D)
  return x.astype(dtype), weight, *(m.astype(dtype) for m in matrices)


def naive(x, expert, weight, gate_up, down):
  """Every expert on every token, then those chosen, weighted."""
  h = jnp.einsum('bsd,edgf->bsegf', x, gate_up)
  y = jnp.einsum('bsef,efd->bsed', jax.nn.silu(h[..., 0, :]) * h[..., 1, :], down)
  chosen = (jax.nn.one_hot(expert, E) * weight[..., None]).sum(2)
  return jnp.einsum('bsed,bse->bsd', y, chosen)


@functools.cache
def compiled(shape):
  """Output and gradients of `expert_mlp` on a mesh, as host arrays."""
  mesh = sh.make_mesh(shape)
  specs = (sh.STREAM, sh.STREAM, sh.STREAM, sh.EXPERTS_ED2F, sh.EXPERTS_EFD)

  @jax.jit
  def run(x, expert, weight, gate_up, down, dout):
    y, vjp = jax.vjp(lambda *a: expert_mlp(a[0], expert, *a[1:]), x, weight, gate_up, down)
    return y, *vjp(dout)

  def call(x, expert, weight, gate_up, down, dout):
    arrays = [
      jax.device_put(a, NamedSharding(mesh, spec))
      for a, spec in zip((x, expert, weight, gate_up, down), specs, strict=True)
    ]
    with jax.set_mesh(mesh), jax.default_matmul_precision('highest'):
      return [np.asarray(a) for a in run(*arrays, jax.device_put(dout, arrays[0].sharding))]

  return call


@functools.cache
def expected(name):
  x, weight, gate_up, down = operands()
  dout = jax.random.normal(jax.random.key(9), x.shape)
  y, vjp = jax.vjp(lambda *a: naive(a[0], routes(name), *a[1:]), x, weight, gate_up, down)
  return [np.asarray(a) for a in (y, *vjp(dout))], np.asarray(dout)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('shape', [(1, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_experts_equal_the_loop_with_their_gradients(shape, name):
  x, weight, gate_up, down = operands()
  arrays, dout = expected(name)
  found = compiled(shape)(x, routes(name), weight, gate_up, down, dout)
  labels = ('y', 'dx', 'dweight', 'dgate_up', 'ddown')
  for label, a, b in zip(labels, found, arrays, strict=True):
    # sums of up to B*S products of order 10 in float32, in another order
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4, err_msg=label)


@pytest.mark.parametrize('shape', [(1, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_an_expert_without_tokens_gets_an_exactly_zero_gradient(shape):
  x, weight, gate_up, down = operands()
  route = routes('one_without_tokens')
  assert not (route == 2).any()
  found = compiled(shape)(x, route, weight, gate_up, down, x)
  np.testing.assert_array_equal(found[3][2], 0)
  np.testing.assert_array_equal(found[4][2], 0)


def on_one_device(x, route, weight, gate_up, down):
  mesh = sh.make_mesh((1, 1, 1))
  split = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    return jax.jit(expert_mlp)(
      *(split(a, sh.STREAM) for a in (x, route, weight)),
      split(gate_up, sh.EXPERTS_ED2F),
      split(down, sh.EXPERTS_EFD),
    )


def test_one_token_visits_its_experts():
  x, weight, gate_up, down = operands()
  x, weight, route = x[:1, :1], weight[:1, :1], routes('mixed')[:1, :1]
  y = on_one_device(x, route, weight, gate_up, down)
  np.testing.assert_allclose(y, naive(x, route, weight, gate_up, down), rtol=1e-5, atol=1e-4)


def test_experts_of_bfloat16_return_bfloat16_close_to_float32():
  x, weight, gate_up, down = operands(jnp.bfloat16)
  route = routes('mixed')
  y = on_one_device(x, route, weight, gate_up, down)
  assert y.dtype == jnp.bfloat16
  x, gate_up, down = (a.astype(jnp.float32) for a in (x, gate_up, down))
  exact = naive(x, route, weight, gate_up, down)
  # the hidden layer and each expert's output are rounded to 8 bits: 2^-8 of the largest of them
  np.testing.assert_allclose(y.astype(np.float32), exact, atol=2**-7 * np.abs(exact).max())


def test_what_is_kept_for_the_backward_pass_is_the_tokens_and_the_hidden_layer():
  T, D, F, E, K = 64, 256, 128, 8, 4
  shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
  x, weight, route = shape(T, D), shape(T, K, dtype=jnp.float32), shape(T, K, dtype=jnp.int32)
  matrices = shape(E, D, 2, F), shape(E, F, D)

  def backward(x, weight, gate_up, down, route):
    run = lambda *a: local_experts(a[0], route, *a[1:], rows=T * K, limit=0.0)
    return jax.vjp(run, x, weight, gate_up, down)[1]

  kept = jax.tree.leaves(jax.eval_shape(backward, x, weight, *matrices, route))
  activations = [a for a in kept if a.ndim != 3 and a.dtype == jnp.bfloat16]
  assert sum(a.size * 2 for a in activations) <= 2 * T * D + 4 * T * K * F
  # the weight, the row and the choice of each row, and two numbers an expert
  plan = [a for a in kept if a.dtype != jnp.bfloat16]
  assert sum(a.size for a in plan) <= 3 * T * K + 2 * E
  assert len(kept) == len(activations) + len(plan) + len(matrices)


def test_a_remat_policy_may_keep_the_hidden_layer():
  x, weight, gate_up, down = operands()
  x, weight, route = (a.reshape(B * S, -1) for a in (x, weight, jnp.asarray(routes('mixed'))))
  keep = jax.checkpoint_policies.save_only_these_names('expert_hidden')
  run = lambda x: local_experts(x, route, weight, gate_up, down, rows=B * S * K, limit=0.0)
  kept = jax.tree.leaves(
    jax.eval_shape(lambda x: jax.vjp(jax.checkpoint(run, policy=keep), x)[1], x)
  )
  shapes = [a.shape for a in kept]
  assert (B * S * K, 2 * F) in shapes and (B * S * K, D) not in shapes


E4M3 = Product('e4m3', 'e4m3', 'block')
E5M2 = Product('e5m2', 'e4m3', 'block', power_of_two=True)
BF16 = Product('bfloat16', 'bfloat16')


@pytest.mark.parametrize(
  'recipe',
  [
    Recipe(E4M3, E4M3, E4M3),
    pytest.param(Recipe(E4M3, E5M2, BF16), marks=pytest.mark.slow),
    pytest.param(Recipe(BF16, BF16, E4M3), marks=pytest.mark.slow),
  ],
  ids=['all', 'forward_and_dgrad', 'wgrad'],
)
def test_experts_in_fp8_are_close_to_float32_with_their_gradients(recipe):
  T, D, F, E, K = 96, 128, 128, 3, 2
  keys = jax.random.split(jax.random.key(0), 6)
  draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
  x, dout = draw(keys[0], T, D), draw(keys[1], T, D)
  matrices = draw(keys[2], E, D, 2, F) * D**-0.5, draw(keys[3], E, F, D) * F**-0.5
  weight = jax.nn.softmax(jax.random.normal(keys[4], (T, K)))
  # expert 2 has no tokens, and some choices are of experts elsewhere
  route = jnp.asarray([[0, 1], [1, 0], [E, 1]], jnp.int32)[jnp.arange(T) % 3]

  def run(recipe, dtype):
    args = x.astype(dtype), weight, *(m.astype(dtype) for m in matrices)
    call = lambda *a: local_experts(a[0], route, *a[1:], rows=T * K, limit=0.0, recipe=recipe)
    y, vjp = jax.vjp(call, *args)
    return [y, *vjp(dout.astype(dtype))]

  found, exact = run(recipe, jnp.bfloat16), run(None, jnp.float32)
  for label, a, b in zip(('y', 'dx', 'dweight', 'dgate_up', 'ddown'), found, exact, strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b)
    # three products with operands of 4 bits (e4m3) or 3 (e5m2), whose errors are independent
    assert np.linalg.norm(a - b) < 0.11 * np.linalg.norm(b), label
    assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(b), label
  np.testing.assert_array_equal(np.asarray(found[3], np.float32)[2], 0)


def test_experts_in_fp8_keep_the_hidden_layer_in_fp8():
  T, D, F, E, K = 64, 384, 128, 8, 4
  shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
  x, weight, route = shape(T, D), shape(T, K, dtype=jnp.float32), shape(T, K, dtype=jnp.int32)
  recipe = Recipe(E4M3, E4M3, E4M3)

  def backward(x, weight, gate_up, down, route):
    run = lambda *a: local_experts(a[0], route, *a[1:], rows=T * K, limit=0.0, recipe=recipe)
    return jax.vjp(run, x, weight, gate_up, down)[1]

  matrices = shape(E, D, 2, F), shape(E, F, D)
  kept = jax.tree.leaves(jax.eval_shape(backward, x, weight, *matrices, route))
  hidden = [a.dtype for a in kept if a.ndim == 2 and a.shape[1] == 2 * F]
  assert hidden == [jnp.float8_e4m3fn]


def test_experts_in_fp8_need_whole_blocks():
  x, weight, gate_up, down = (a.astype(jnp.bfloat16) for a in operands())
  x, weight, route = (a.reshape(B * S, -1) for a in (x, weight, jnp.asarray(routes('mixed'))))
  with pytest.raises(ValueError, match='multiples of 128'):
    local_experts(
      x, route, weight, gate_up, down, rows=B * S * K, limit=0.0, recipe=Recipe(E4M3, E4M3, E4M3)
    )


def test_tokens_that_travel_in_fp8_are_those_rounded_beforehand():
  keys, D, F = jax.random.split(jax.random.key(0), 4), 128, 6
  x = jax.random.normal(keys[0], (B, S, D))
  rounded = qz.dequantize_rows(qz.quantize_rows(x.reshape(-1, D))).reshape(x.shape)
  host = (
    routes('mixed'),
    jax.nn.softmax(jax.random.normal(keys[1], (B, S, K))),
    jax.random.normal(keys[2], (E, D, 2, F)),
    jax.random.normal(keys[3], (E, F, D)),
  )
  mesh = sh.make_mesh((1, 4, 1))
  with jax.set_mesh(mesh):
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    specs = (sh.STREAM, sh.STREAM, sh.EXPERTS_ED2F, sh.EXPERTS_EFD)
    rest = [put(a, spec) for a, spec in zip(host, specs, strict=True)]

    def both(x, **how):
      y, pull = jax.vjp(jax.jit(lambda x: expert_mlp(x, *rest, **how)), put(x, sh.STREAM))
      # ones are numbers of the format: what is left is the gradient at the rounded token
      return y, pull(jnp.ones_like(y))[0]

    for found, want in zip(both(x, travel=qz.Format()), both(rounded), strict=True):
      np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max()))
