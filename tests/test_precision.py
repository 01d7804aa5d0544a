"""The copy that a step multiplies with is the parameters, rounded where they would be anyway."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.models.decoder import Decoder
from moe_jax.precision import compute_copy, policy
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
