"""Muon orthogonalises every logically independent matrix, on any mesh, and AdamW has the rest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.config import DataConfig, MTPConfig, MuonConfig, OptimConfig, RunConfig
from moe_jax.optim import muon
from moe_jax.optim.matrices import layout
from moe_jax.optim.muon import orthogonal_momentum
from moe_jax.optim.newton_schulz import ROUNDS, orthogonalize
from moe_jax.train.state import create
from tests.models import tiny_v4

# L layers  D model  F width  E experts  H heads  X head width  Q latent width

MESHES = [(1, 1, 1), (2, 2, 2), (1, 8, 1)]
OPTIM = OptimConfig(name='muon', lr_peak=0.01, schedule='constant', warmup_steps=0)

# name -> shape, spec, and how float64 NumPy finds its matrices
PARAMS = {
  'q_up_QHX': ((2, 8, 8, 6), jax.P(None, *sh.HEADS_DHC)),
  'out_HVD': ((2, 8, 4, 16), jax.P(None, *sh.HEADS_HCD)),
  'gate_DF': ((3, 16, 8), jax.P(None, *sh.MATRIX_DF)),
  'router_DE': ((1, 16, 8), jax.P(None, *sh.MATRIX_DX)),
  'join_XD': ((32, 16), sh.MATRIX_DX),
  'gate_up_ED2F': ((2, 8, 16, 2, 4), jax.P(None, *sh.EXPERTS_ED2F)),
  'down_EFD': ((2, 8, 4, 16), jax.P(None, *sh.EXPERTS_EFD)),
}


def matrices(name: str, x: np.ndarray) -> np.ndarray:
  """[N, X, Y], written out by hand for each name."""
  match name:
    case 'q_up_QHX':
      return x.reshape(2, 8, 48)
    case 'out_HVD':
      return x.reshape(2, 32, 16)
    case 'gate_up_ED2F':
      return np.moveaxis(x, 3, 2).reshape(32, 16, 4)
    case 'down_EFD':
      return x.reshape(16, 4, 16)
  return x.reshape(-1, *x.shape[-2:])


def by_singular_values(m_NXY: np.ndarray) -> np.ndarray:
  """The iteration in float64 on singular values alone: another road to the same matrix."""
  u, s, vt = np.linalg.svd(m_NXY.astype(np.float64), full_matrices=False)
  s = s / np.sqrt((s**2).sum(-1, keepdims=True))
  for a, b, c in ROUNDS:
    s = a * s + b * s**3 + c * s**5
  return (u * s[:, None]) @ vt


def draw(seed: int, name: str) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=PARAMS[name][0]).astype(np.float32)


def updates_on(mesh, dtype='float32') -> dict[str, np.ndarray]:
  """Updates of the second of two steps."""
  tx = orthogonal_momentum(0.95, rms=0.18, dtype=dtype)
  with jax.set_mesh(sh.make_mesh(mesh)):

    def grads(seed):
      return {n: jax.device_put(draw(seed, n), spec) for n, (_, spec) in PARAMS.items()}

    update = jax.jit(tx.update)
    _, state = update(grads(0), tx.init(grads(2)))
    updates, state = update(grads(1), state)
    for name, (_, spec) in PARAMS.items():
      assert jax.typeof(updates[name]).sharding.spec == spec
      assert jax.typeof(state.momentum[name]).sharding.spec == spec
    return jax.tree.map(np.asarray, updates)


on_mesh = functools.cache(updates_on)


@pytest.mark.parametrize('name', PARAMS)
def test_update_equals_float64_orthogonalisation_of_each_matrix(name):
  g0, g1 = (matrices(name, draw(seed, name)) for seed in (0, 1))
  want = by_singular_values(0.95 * (0.95 * g0 + g1) + g1)
  want *= 0.18 * np.sqrt(max(want.shape[1:]))
  got = matrices(name, on_mesh((1, 1, 1))[name])
  # values of order 0.2; measured 4.4e-7
  np.testing.assert_allclose(got, want, atol=3e-6)


@pytest.mark.parametrize('mesh', MESHES[1:], ids=str)
def test_update_on_eight_devices_equals_one(mesh):
  for name, got in on_mesh(mesh).items():
    np.testing.assert_allclose(got, on_mesh((1, 1, 1))[name], atol=3e-6, err_msg=name)


@pytest.mark.parametrize('shape', [(64, 64), (96, 64), (32, 200)])
def test_orthogonalize_brings_singular_values_to_one(shape):
  x = jax.random.normal(jax.random.key(0), (2, *shape))
  s = np.linalg.svd(np.asarray(orthogonalize(x), np.float64), compute_uv=False)
  # the scalar iteration ends in [1, 1.00054] from any start in [3e-4, 1]; 2e-5: float32
  assert s.min() > 1 - 2e-5 and s.max() < 1.00054 + 2e-5, (s.min(), s.max())


def test_update_has_root_mean_square_018():
  # of an X x Y matrix with unit singular values: sqrt(min / (X Y)) = 1 / sqrt(max)
  for name, update in on_mesh((1, 1, 1)).items():
    rms = np.sqrt(np.square(matrices(name, update)).mean((1, 2)))
    np.testing.assert_allclose(rms, 0.18, rtol=6e-4, err_msg=name)


def test_bfloat16_products_stay_near_orthogonal():
  x = jax.random.normal(jax.random.key(0), (1, 64, 96))
  s = np.linalg.svd(np.asarray(orthogonalize(x, dtype='bfloat16')), compute_uv=False)
  # eight bits of mantissa, a few roundings deep
  assert s.min() > 0.97 and s.max() < 1.03


def test_orthogonalize_leaves_zero_at_zero():
  assert not np.asarray(orthogonalize(jnp.zeros((2, 4, 6)))).any()


def test_layout_refuses_an_unknown_name():
  with pytest.raises(ValueError, match='strange_ABC'):
    layout('strange_ABC', 4)


def test_step_of_a_matrix_decays_it_and_moves_against_the_momentum():
  w = jax.random.normal(jax.random.key(0), (16, 8))
  g = jax.random.normal(jax.random.key(1), (16, 8))
  tx = muon(OPTIM, steps=10)
  updates, _ = tx.update({'gate_DF': g}, tx.init({'gate_DF': w}), {'gate_DF': w})
  got = np.asarray(optax.apply_updates({'gate_DF': w}, updates)['gate_DF'])
  direction = by_singular_values(np.asarray(g)[None])[0]
  want = np.asarray(w) * (1 - 0.01 * 0.1) - 0.01 * 0.18 * np.sqrt(16) * direction
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_embedding_head_and_norms_get_adamw():
  params = {'embedding_VD': jnp.ones((8, 4)), 'head_DV': jnp.ones((4, 8)), 'weight_D': jnp.ones(4)}
  grads = jax.tree.map(lambda p: 1e-3 * jnp.arange(p.size, dtype=p.dtype).reshape(p.shape), params)
  adamw = optax.adamw(
    0.01, 0.9, 0.95, 1e-20, weight_decay=0.1, mask={n: n != 'weight_D' for n in params}
  )
  want, _ = adamw.update(grads, adamw.init(params), params)
  tx = muon(OPTIM, steps=10)
  got, _ = tx.update(grads, tx.init(params), params)
  for name in params:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_state_is_sharded_as_the_parameters_and_matrices_hold_one_moment():
  cfg = config_io.build({'optim': {'name': 'muon'}, 'data': {'batch_size': 8}})
  with jax.set_mesh(sh.make_mesh((2, 2, 2))):
    state = jax.eval_shape(functools.partial(create, cfg), jax.random.key(0))
  specs = {
    jax.tree_util.keystr(p): x.sharding
    for p, x in jax.tree_util.tree_leaves_with_path(state.params)
  }
  seen = dict.fromkeys(specs, 0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt):
    for name in specs:
      if jax.tree_util.keystr(path).endswith(name):
        assert leaf.sharding == specs[name]
        seen[name] += 1
  for name, count in seen.items():
    leaf = name.split("'")[-2]
    adamw = leaf in ('embedding_VD', 'head_DV', 'weight_D')
    assert count == (2 if adamw else 1), name


@pytest.mark.parametrize(
  ('field', 'value'), [('momentum', 1.0), ('update_rms', 0.0), ('dtype', 'int8')]
)
def test_config_refuses_impossible_values(field, value):
  with pytest.raises(ValueError, match=f'optim.muon.{field}'):
    MuonConfig(**{field: value})


def test_config_refuses_an_unknown_optimizer():
  with pytest.raises(ValueError, match=r"optim\.name='sgd'"):
    OptimConfig(name='sgd')


def test_every_parameter_of_v4_has_a_rule_and_is_decided_as_the_report_says():
  model = dataclasses.replace(tiny_v4.CONFIG, mtp=MTPConfig(num_modules=1))
  cfg = RunConfig(model=model, optim=OPTIM, data=DataConfig(batch_size=8))
  with jax.set_mesh(sh.make_mesh((2, 2, 2))):
    state = jax.eval_shape(functools.partial(create, cfg), jax.random.key(0))
  rest = {
    path[-1].key
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    if layout(path[-1].key, leaf.ndim) is None
  }
  one_dimensional = {'weight_D', 'sink_H', 'base_X', 'base_J', 'scale_1', 'scale_3'}
  assert rest == {'embedding_VD', 'head_DV', 'bias_MX'} | one_dimensional
