"""One step on eight fake devices is the step of one device, whatever the mesh and micro-batches."""

# B batch  S sequence  L layers with experts  E experts

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.config import DataConfig, MLAConfig, ModelConfig, MoEConfig, RunConfig
from moe_jax.train import layers
from moe_jax.train.state import create, make_model
from moe_jax.train.step import loss_and_grads, make_train_step

pytestmark = pytest.mark.slow

MODEL = ModelConfig(
  vocab_size=48,
  d_model=16,
  num_layers=3,
  d_ff=16,
  init_std=0.2,
  mla=MLAConfig(num_heads=2, d_nope=8, d_rope=4, d_value=8, kv_rank=8, q_rank=8),
  moe=MoEConfig(num_experts=8, top_k=2, d_expert=8, num_groups=4, top_groups=2),
)
B, S, L, E, K = 16, 12, 2, 8, 2
MESHES = [(1, 1, 1), (8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2)]


def make_cfg(microbatches=1) -> RunConfig:
  return RunConfig(
    model=MODEL,
    microbatches=microbatches,
    balance='loss_free+sequence_wise+z_loss+expert_level',
    data=DataConfig(batch_size=B, sequence_length=S),
  )


def make_batch() -> dict[str, np.ndarray]:
  """Rows of two documents, unequally many targets, and padding in the last rows."""
  rng = np.random.default_rng(0)
  segments = np.ones((B, S), np.int32)
  positions = np.tile(np.arange(S, dtype=np.int32), (B, 1))
  for row, border in enumerate(rng.integers(2, S - 2, B)):
    segments[row, border:] = 2
    positions[row, border:] -= border
  segments[-2:, 8:] = 0
  mask = (segments > 0) & (rng.random((B, S)) < 0.8)
  mask[:3] = False
  tokens, targets = rng.integers(0, 48, (2, B, S)).astype(np.int32)
  return {
    'tokens': tokens,
    'targets': targets,
    'segments': segments,
    'positions': positions,
    'loss_mask': mask,
  }


class Seen(NamedTuple):
  """What a step computes, on the host."""

  losses: dict[str, float]
  load_LE: np.ndarray
  grads: Any


def on_mesh(mesh, function, *arguments):
  """Calls a jitted `function` with the test's batch, split over the mesh."""
  with jax.set_mesh(mesh), jax.default_matmul_precision('highest'):
    batch = {
      name: jax.device_put(a, jax.NamedSharding(mesh, sh.TOKENS))
      for name, a in make_batch().items()
    }
    return function(*arguments, batch)


@functools.cache
def created(shape):
  """A fresh state, drawn on a mesh."""
  with jax.set_mesh(sh.make_mesh(shape)):
    return jax.jit(functools.partial(create, make_cfg()))(jax.random.key(0))


def make_state(shape, *, crowd=()):
  """The state drawn on one device, placed on a mesh; the bias of a `crowd` draws every token."""
  mesh = sh.make_mesh(shape)
  with jax.set_mesh(mesh):
    target = jax.eval_shape(functools.partial(create, make_cfg()), jax.random.key(0))

  def place(value, like):
    spec = like.sharding.spec if like.sharding is not None else jax.P()
    return jax.device_put(np.asarray(value), jax.NamedSharding(mesh, spec))

  def favour(bias):
    values = np.zeros(bias.shape, np.float32)
    values[..., list(crowd)] = 10.0
    return jax.device_put(values, bias.sharding)

  state = jax.tree.map(place, created((1, 1, 1)), target)
  return state._replace(router=jax.tree.map(favour, state.router))


@functools.cache
def compiled(shape, microbatches):
  mesh, cfg = sh.make_mesh(shape), make_cfg(microbatches)
  model = make_model(cfg, training=True)
  step = lambda params, rest, batch: loss_and_grads(cfg, model, params, rest, batch)
  return mesh, jax.jit(step)


@functools.cache
def see(shape, microbatches=1, crowd=()) -> Seen:
  mesh, step = compiled(shape, microbatches)
  state = make_state(shape, crowd=crowd)
  seen, grads = on_mesh(mesh, step, state.params, state.rest)
  losses = {name: float(v) for name, v in seen.items() if name.endswith('loss')}
  assert losses['balance_loss'] > 0
  return Seen(losses, np.asarray(seen['load_LE']), jax.tree.map(np.asarray, grads))


def assert_same_step(found: Seen, expected: Seen) -> None:
  for name, value in expected.losses.items():
    np.testing.assert_allclose(found.losses[name], value, rtol=1e-5, err_msg=name)
  np.testing.assert_array_equal(found.load_LE, expected.load_LE)
  paths = jax.tree_util.tree_leaves_with_path(expected.grads)
  for (path, b), a in zip(paths, jax.tree.leaves(found.grads), strict=True):
    name = jax.tree_util.keystr(path)
    # relative to the largest of the tensor: sums over devices come in another order
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max(), err_msg=name)


def test_the_batch_routes_every_token_to_its_experts_and_counts_padding_nowhere():
  load_LE = see((1, 1, 1)).load_LE
  valid = (make_batch()['segments'] > 0).sum()
  np.testing.assert_array_equal(load_LE.sum(-1), [valid * K] * L)
  assert (load_LE > 0).all()


def test_every_parameter_gets_a_gradient():
  for path, grad in jax.tree_util.tree_leaves_with_path(see((1, 1, 1)).grads):
    assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize('shape', MESHES[1:], ids=str)
def test_mesh_gives_the_loss_the_gradients_and_the_counts_of_one_device(shape):
  assert_same_step(see(shape), see((1, 1, 1)))


@pytest.mark.parametrize('shape', [(2, 4, 1), (1, 8, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize('crowd', [(6, 7), (0, 5)], ids=['one_device_of_four', 'two_devices'])
def test_no_token_is_lost_when_all_want_the_same_experts(shape, crowd):
  found = see(shape, crowd=crowd)
  valid = (make_batch()['segments'] > 0).sum()
  expected_E = np.zeros(E)
  expected_E[list(crowd)] = valid
  np.testing.assert_array_equal(found.load_LE, [expected_E] * L)
  assert_same_step(found, see((1, 1, 1), crowd=crowd))


def test_micro_batches_give_the_step_of_the_whole_batch():
  for microbatches in (2, 4):
    assert_same_step(see((1, 1, 1), microbatches), see((1, 1, 1)))


def test_micro_batches_on_a_mesh_give_the_step_of_the_whole_batch():
  assert_same_step(see((2, 4, 1), 2), see((1, 1, 1)))


def test_the_bias_moves_by_the_counts_of_every_micro_batch_and_device():
  shape = (2, 4, 1)
  mesh, step = sh.make_mesh(shape), jax.jit(make_train_step(make_cfg(microbatches=2)))
  new, metrics = on_mesh(mesh, step, make_state(shape))
  assert metrics['guard/skipped'] == 0
  load_LE = see((1, 1, 1)).load_LE
  step_LE = 1e-3 * np.sign(load_LE.mean(-1, keepdims=True) - load_LE)
  with jax.set_mesh(mesh):
    np.testing.assert_allclose(layers.stack(new.router, 'bias_E'), step_LE, rtol=1e-6)


def test_every_mesh_starts_from_the_same_parameters():
  states = [created(shape) for shape in ((1, 1, 1), (2, 2, 2))]
  one, many = ([np.asarray(leaf) for leaf in jax.tree.leaves(s)] for s in states)
  for a, b in zip(one, many, strict=True):
    np.testing.assert_array_equal(a, b)


def test_each_device_holds_its_share_of_the_parameters():
  params = created((2, 2, 2)).params
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = path[-1].key
    whole = 1 if name == 'weight_D' else 2 if name in WIDTH_WHOLE else 4
    whole = 8 if name in ('gate_up_ED2F', 'down_EFD') else whole
    share = leaf.addressable_shards[0].data.size
    assert share * whole == leaf.size, jax.tree_util.keystr(path)


# split over `data` alone: their widths are not for `model` to split
WIDTH_WHOLE = ('router_DE', 'kv_down_DX', 'q_down_DQ')
