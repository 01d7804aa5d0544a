"""Policies: their tables, products that follow them, and the copy that a step multiplies with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.config import PrecisionOverrides
from moe_jax.models.decoder import Decoder
from moe_jax.models.layers import Matrix, matmul
from moe_jax.ops.linear import Weights
from moe_jax.precision import compute_copy, policy, quantized_copy, table
from tests.models import tiny_v4
from tests.models.kinds import KINDS, initial, tiny, where_of
from tests.models.test_decoder import V3, B, S, make_tokens, make_where, variables

BFLOAT16 = policy('bfloat16')


def check(cfg, values, where):
  # or XLA would leave out the rounding of a weight that it reads as float32 again
  exact = {'xla_allow_excess_precision': False}
  apply = jax.jit(Decoder(cfg, BFLOAT16).apply, compiler_options=exact)
  copy = values | {'params': compute_copy(BFLOAT16, values['params'])}
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(copy['params'])}
  assert dtypes == {jnp.dtype('bfloat16'), jnp.dtype('float32')}
  for one, other in zip(
    jax.tree.leaves(apply(values, where)), jax.tree.leaves(apply(copy, where)), strict=True
  ):
    np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


@pytest.fixture(autouse=True)
def on_one_device():
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    yield


@pytest.mark.slow
def test_copy_of_v3_gives_the_same_bits():
  check(V3, variables('v3'), make_where(make_tokens()))


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_copy_of_sparse_kinds_gives_the_same_bits(kind):
  cfg = tiny(kind)
  values = jax.tree.map(jnp.asarray, initial(cfg))
  check(cfg, values, where_of(np.arange(B * S).reshape(B, S) % 40))


@pytest.mark.slow
def test_copy_of_v4_gives_the_same_bits():
  _, values = tiny_v4.make()
  check(tiny_v4.CONFIG, values, where_of(np.arange(32).reshape(2, 16)))


def test_one_word_overrides_one_line():
  overrides = PrecisionOverrides(linear_dgrad='e5m2', experts_wgrad='bfloat16')
  changed = table('fp8_block', overrides)
  assert changed['linear_dgrad'].operands == 'e5m2*e4m3'
  assert changed['experts_wgrad'][:2] == ('bfloat16', 'none')
  same = set(changed) - {'linear_dgrad', 'experts_wgrad'}
  assert {kind: changed[kind] for kind in same} == {
    kind: line for kind, line in table('fp8_block').items() if kind in same
  }


@pytest.mark.parametrize('name', ['float32', 'bfloat16', 'fp8_tensor', 'fp8_block'])
def test_every_policy_has_every_line(name):
  assert list(table(name)) == list(table('float32'))
  assert policy(name).name == name


def test_a_word_that_does_not_exist_is_refused_with_those_that_do():
  with pytest.raises(ValueError, match=r'linear_dgrad.*e4m4.*float32, bfloat16, e4m3, e5m2'):
    PrecisionOverrides(linear_dgrad='e4m4')


def test_experts_with_one_scale_a_tensor_are_refused():
  with pytest.raises(ValueError, match=r"experts_forward.*'tensor', which is not one of.*block"):
    PrecisionOverrides(experts_forward='e4m3 tensor')


def test_gradients_of_more_bits_come_from_the_masters():
  exact = policy('bfloat16', PrecisionOverrides(gradients='float32'))
  params = {'up_DF': jnp.full((128, 128), 1.001)}
  assert compute_copy(exact, params)['up_DF'].dtype == jnp.float32
  assert not exact.plain


EQUATIONS = {
  'bsd,df->bsf': (sh.MATRIX_DF, (64, 128), None),
  'bsd,dhc->bshc': (sh.HEADS_DHC, (64, 2, 32), None),
  'bshc,hcd->bsd': (sh.HEADS_HCD, (2, 32, 64), sh.STREAM),
}


@pytest.mark.parametrize('equation', EQUATIONS)
def test_products_by_recipe_have_the_einsum_s_shape_and_nearly_its_values(equation):
  spec, shape, out = EQUATIONS[equation]
  num_contracted = 2 if equation.startswith('bshc') else 1
  x_shape = (2, 8, *shape[:num_contracted])
  x = jax.random.normal(jax.random.key(0), x_shape, jnp.bfloat16)
  x = jax.sharding.reshard(x, sh.STREAM if num_contracted == 1 else sh.HEADS)
  w = jax.sharding.reshard(jax.random.normal(jax.random.key(1), shape), spec)
  call = lambda name: matmul(equation, x, w, spec, policy=policy(name), out=out)
  expected, found = (call(name).astype(jnp.float32) for name in ('bfloat16', 'fp8_block'))
  assert jax.typeof(found).sharding.spec == jax.typeof(expected).sharding.spec
  error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
  # e4m3 has 3 bits: each operand is off by 2^-4 at most, 2.6% in the mean square
  assert 0.01 < error < 0.06


def test_equations_that_are_no_product_of_matrices_stay_as_they_are():
  x = jax.sharding.reshard(jnp.ones((2, 8, 2, 32), jnp.bfloat16), sh.HEADS)
  w = jax.sharding.reshard(jnp.ones((64, 2, 32)), sh.HEADS_DHC)
  y = matmul('bshn,rhn->bshr', x, w, sh.HEADS_DHC, policy=policy('fp8_block'))
  np.testing.assert_array_equal(y.astype(jnp.float32), 32)


@pytest.mark.parametrize('name', ['fp8_block', 'fp8_tensor'])
def test_weights_quantised_once_are_those_that_products_would_make(name):
  FP8 = policy(name)
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (1, 8, 2, 128), jnp.bfloat16)
  params = {'out_HCD': jax.random.normal(keys[1], (3, 2, 128, 192))}
  dy = jax.random.normal(keys[2], (1, 8, 192), jnp.bfloat16)
  ready = quantized_copy(FP8, params)['fp8']['out_HCD']

  def product(x, w, ready):
    return matmul('bshc,hcd->bsd', x, Matrix(w, ready), jax.P(), policy=FP8)

  def both(ready):
    y, backward = jax.vjp(lambda x, w: product(x, w, ready), x, params['out_HCD'][1])
    return y, *backward(dy)

  exact = {'xla_allow_excess_precision': False}
  one = jax.tree.map(lambda a: a[1], ready)
  found, expected = (jax.jit(both, compiler_options=exact)(r) for r in (one, Weights(None, None)))
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


def test_a_mesh_of_several_devices_has_no_weights_quantised_once():
  with jax.set_mesh(sh.make_mesh((2, 2, 2))):
    assert not quantized_copy(policy('fp8_block'), {})
