"""What ideas carry is part of the state: equal on every mesh, not moved by a refused step."""

# L layers with experts  E experts

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.config import DataConfig, MoEConfig, RunConfig
from moe_jax.train.state import create, init_variables, make_model
from moe_jax.train.step import make_train_step
from tests.multi_device.test_equal_meshes import MODEL, B, S, on_mesh

MOE = MoEConfig(num_experts=8, top_k=2, d_expert=8)
BALANCE = 'smebu+phi+global_batch+switch+default_expert'


def make_cfg(microbatches: int) -> RunConfig:
  return RunConfig(
    model=dataclasses.replace(MODEL, moe=MOE),
    microbatches=microbatches,
    balance=BALANCE,
    data=DataConfig(batch_size=B, sequence_length=S),
  )


@functools.cache
def steps(shape, microbatches, num=2):
  """The state after some steps, their metrics, and the state after a step with a NaN in it."""
  cfg, mesh = make_cfg(microbatches), sh.make_mesh(shape)
  with jax.set_mesh(mesh):
    state = jax.jit(functools.partial(create, cfg))(jax.random.key(0))
  step, seen = jax.jit(make_train_step(cfg)), []
  for _ in range(num):
    state, metrics = on_mesh(mesh, step, state)
    seen.append(jax.tree.map(np.asarray, metrics))
  with jax.set_mesh(mesh):
    broken = state._replace(params=jax.tree.map(lambda a: a * np.nan, state.params))
  refused, metrics = on_mesh(mesh, step, broken)
  assert metrics['guard/skipped'] == 1
  return jax.tree.map(np.asarray, (state.rest, seen, refused.rest))


@pytest.mark.slow
def test_a_seed_means_the_same_weights_under_every_idea():
  def weights(balance: str):
    with jax.set_mesh(sh.make_mesh((1, 1, 1))):
      cfg = dataclasses.replace(make_cfg(1), balance=balance)
      model, key = make_model(cfg), jax.random.key(0)
      return jax.jit(lambda: init_variables(model, key)['params'])()

  jax.tree.map(np.testing.assert_array_equal, weights('none'), weights('smebu+phi'))


@pytest.mark.slow
def test_eight_devices_and_micro_batches_carry_what_one_batch_on_one_device_does():
  (rest, seen, _), (want, want_seen, _) = steps((2, 4, 1), 2), steps((1, 1, 1), 1)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), rest, want)
  assert {'smebu', 'phi', 'default_expert'} <= want['ideas']['group_1']['layer_0']['moe'].keys()
  for name in ('train/balance_loss', 'router/max_vio', 'router/entropy', 'router/grad_norm'):
    np.testing.assert_allclose(seen[-1][name], want_seen[-1][name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_refused_step_moves_nothing_that_ideas_carry():
  rest, _, refused = steps((1, 1, 1), 1)
  jax.tree.map(np.testing.assert_array_equal, refused, rest)
