"""Lookup and its gradient against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.ops.embedding import embed

# B batch  S sequence  V vocabulary  D model


def make(V, D=64, B=2, S=20):
  keys = jax.random.split(jax.random.key(V), 3)
  table_VD = jax.random.normal(keys[0], (V, D))
  # ids as text has them: a few everywhere, most nowhere
  token_BS = (jax.random.randint(keys[1], (B, S), 0, V) ** 2) % V
  return table_VD, token_BS, jax.random.normal(keys[2], (B, S, D))


def written_out(table_VD, token_BS, dy_BSD):
  sums = np.zeros(table_VD.shape)
  np.add.at(sums, np.asarray(token_BS), np.asarray(dy_BSD, np.float64))
  return sums


@pytest.mark.parametrize('implementation', ['scatter', 'grouped'])
@pytest.mark.parametrize('V', [7, 128, 300])
def test_rows_of_an_id_are_summed(implementation, V):
  table_VD, token_BS, dy_BSD = make(V)
  call = lambda table: embed(table, token_BS, dtype=jnp.float32, implementation=implementation)
  y_BSD, backward = jax.vjp(call, table_VD)
  np.testing.assert_array_equal(y_BSD, table_VD[token_BS])
  (found,) = backward(dy_BSD)
  np.testing.assert_allclose(found, written_out(table_VD, token_BS, dy_BSD), atol=1e-5)


@pytest.mark.parametrize('implementation', ['scatter', 'grouped'])
def test_sums_of_bfloat16_rows_are_float32(implementation):
  table_VD, _, dy_BSD = make(130, B=1, S=512)
  token_BS = jnp.full((1, 512), 129)
  dy_BSD = dy_BSD.astype(jnp.bfloat16)
  call = lambda table: embed(table, token_BS, dtype=jnp.bfloat16, implementation=implementation)
  (found,) = jax.vjp(call, table_VD)[1](dy_BSD)
  assert found.dtype == jnp.float32
  # 512 exact terms in float32; in bfloat16 the sum would be off by percents
  np.testing.assert_allclose(
    found, written_out(table_VD, token_BS, dy_BSD.astype(jnp.float32)), atol=1e-4
  )


def test_an_unknown_implementation_is_refused():
  table_VD, token_BS, _ = make(7)
  with pytest.raises(ValueError, match='scatter, grouped'):
    embed(table_VD, token_BS, dtype=jnp.float32, implementation='sorted')


def test_a_mesh_changes_nothing():
  table_VD, token_BS, dy_BSD = make(128)
  call = lambda table, token: embed(table, token, dtype=jnp.float32)
  expected = jax.vjp(lambda t: call(t, token_BS), table_VD)[1](dy_BSD)[0]
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    table = jax.sharding.reshard(table_VD, sh.EMBEDDING_VD)
    token, dy = jax.sharding.reshard(token_BS, sh.TOKENS), jax.sharding.reshard(dy_BSD, sh.STREAM)
    y_BSD, backward = jax.vjp(lambda t: call(t, token), table)
    np.testing.assert_array_equal(y_BSD, table_VD[token_BS])
    np.testing.assert_allclose(backward(dy)[0], expected, atol=1e-6)
