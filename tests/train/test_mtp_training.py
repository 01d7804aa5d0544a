"""Training with multi-token prediction: the loss, where its gradients go, the router, the cost."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.config import RunConfig
from moe_jax.models import mtp
from moe_jax.train import cost, layers
from moe_jax.train.state import create, make_model
from moe_jax.train.step import loss_and_grads, make_train_step

# B batch  S sequence  L layers with experts, modules included  E experts

MODULES = 2


def config(num_modules: int = MODULES, **fields) -> RunConfig:
  model = {
    'vocab_size': 64, 'd_model': 32, 'num_layers': 2, 'd_ff': 48, 'init_std': 0.05,
    'mla': {'num_heads': 4, 'd_nope': 8, 'd_rope': 4, 'd_value': 8, 'kv_rank': 12, 'q_rank': 16},
    'moe': {'num_experts': 8, 'top_k': 2, 'd_expert': 16},
    'mtp': {'num_modules': num_modules},
  }  # fmt: skip
  optim = {'warmup_steps': 0, 'schedule': 'constant', 'lr_peak': 3e-3} | fields.pop('optim', {})
  data = {'batch_size': 8, 'sequence_length': 12}
  return config_io.build({'model': model, 'data': data, 'optim': optim} | fields)


def batch() -> dict[str, jax.Array]:
  rng = np.random.default_rng(0)
  token = rng.integers(0, 64, (8, 13))
  document = np.sort(rng.integers(1, 4, (8, 13)), axis=1)
  arrays = {
    'tokens': token[:, :-1],
    'targets': token[:, 1:],
    'segments': document[:, :-1],
    'positions': np.tile(np.arange(12), (8, 1)),
    'loss_mask': document[:, :-1] == document[:, 1:],
  }
  dtypes = {'loss_mask': bool}
  return {n: jax.device_put(a.astype(dtypes.get(n, 'int32')), sh.TOKENS) for n, a in arrays.items()}


def target(cfg: RunConfig):
  return jax.eval_shape(functools.partial(create, cfg), jax.random.key(0))


def start(cfg: RunConfig):
  """A state on the current mesh; drawn by NumPy, which needs no compiling."""

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    if name.startswith('.params') and 'weight_D' not in name:
      # the same for the same name, however many modules there are
      rng = np.random.default_rng(zlib.crc32(name.encode()))
      a = rng.normal(size=leaf.shape, scale=0.1).astype(leaf.dtype)
    else:
      a = np.full(leaf.shape, 'weight_D' in name and name.startswith('.params'), leaf.dtype)
    return jax.device_put(a, leaf.sharding.spec if leaf.sharding else jax.P())

  return jax.tree_util.tree_map_with_path(draw, target(cfg))


def curve(cfg: RunConfig, mesh: tuple[int, int, int], steps: int) -> dict[str, np.ndarray]:
  """Each metric's values over steps on one batch."""
  with jax.set_mesh(sh.make_mesh(mesh)):
    state, step, data = start(cfg), jax.jit(make_train_step(cfg)), batch()
    rows = []
    for _ in range(steps):
      state, metrics = step(state, data)
      rows.append(jax.tree.map(np.asarray, metrics))
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def first(num_modules: int, microbatches: int = 1, remat: str = 'none'):
  """What the first step sees, and its gradients by name."""
  cfg = config(num_modules, microbatches=microbatches)
  cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat=remat))
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    state = start(cfg)
    run = lambda params, data: loss_and_grads(cfg, make_model(cfg), params, state.rest, data)
    seen, grads = jax.tree.map(np.asarray, jax.jit(run)(state.params, batch()))
  return seen, {jax.tree_util.keystr(p): g for p, g in jax.tree_util.tree_leaves_with_path(grads)}


def test_loss_is_the_models_plus_the_weighted_mean_over_modules():
  seen, _ = first(MODULES)
  want = seen['lm_loss'] + 0.3 * seen['mtp_loss'] + seen['balance_loss']
  np.testing.assert_allclose(seen['loss'], want, rtol=1e-6)


def test_lm_loss_does_not_change_by_a_bit_and_no_mtp_loss_appears_without_modules():
  assert first(MODULES)[0]['lm_loss'] == first(0)[0]['lm_loss']
  assert 'mtp_loss' not in first(0)[0]


def test_gradients_of_the_mtp_loss_reach_the_whole_decoder_and_every_module():
  (_, plain), (_, grads) = first(0), first(MODULES)
  for name, g in grads.items():
    assert np.abs(g - plain.get(name, 0)).max() > 0, name


def test_mtp_loss_is_the_mean_over_targets_within_documents():
  cfg = config()
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    state, data, model = start(cfg), batch(), make_model(cfg)
    where = mtp.Where(data['tokens'], data['positions'], data['segments'], jnp.zeros(8, jnp.int32))
    out = jax.jit(model.apply)(state.variables, where)
    data = jax.tree.map(np.asarray, data)
    losses = []
    for k in (1, 2):
      logits = np.asarray(out.mtp_hidden[k - 1], np.float64) @ np.asarray(state.params['head_DV'])
      nats = np.log(np.exp(logits).sum(-1))
      seg = data['segments']
      losses.append(
        [
          nats[b, i] - logits[b, i, data['targets'][b, i + k]]
          for b in range(8)
          for i in range(12 - k)
          if seg[b, i] == seg[b, i + k] and data['loss_mask'][b, i + k]
        ]
      )
  want = np.mean([np.mean(part) for part in losses])
  np.testing.assert_allclose(first(MODULES)[0]['mtp_loss'], want, rtol=1e-5)


@pytest.mark.slow
def test_two_microbatches_give_the_loss_of_one():
  for name in ('mtp_loss', 'lm_loss'):
    np.testing.assert_allclose(first(MODULES, 2)[0][name], first(MODULES)[0][name], rtol=1e-6)


@pytest.mark.slow
def test_remat_changes_no_loss():
  got, want = first(MODULES, remat='full')[0]['loss'], first(MODULES)[0]['loss']
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_modules_count_tokens_like_layers_where_they_look_into_their_document():
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    segment_BS = np.asarray(batch()['segments'])
  tokens = [segment_BS.size] + [
    np.asarray(mtp.same_document(jnp.asarray(segment_BS), k)).sum() for k in (1, 2)
  ]
  np.testing.assert_array_equal(first(MODULES)[0]['load_LE'].sum(-1), 2 * np.array(tokens))


def test_stack_puts_modules_behind_the_layers_and_unstack_takes_them_back():
  def layer(first, shape):
    return {'moe': {'bias_E': np.arange(first, first + np.prod(shape)).reshape(shape)}}

  router = {
    'mtp_1': {'block': layer(100, (4,))},
    'group_1': {'layer_0': layer(0, (2, 4)), 'layer_1': layer(50, (2, 4))},
    'mtp_2': {'block': layer(200, (4,))},
  }
  bias_LE = layers.stack(router, 'bias_E')
  np.testing.assert_array_equal(bias_LE[:, 0], [0, 50, 4, 54, 100, 200])
  back = layers.unstack(router, 'bias_E', bias_LE)
  jax.tree.map(np.testing.assert_array_equal, back, router)


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_eight_devices_train_as_one_and_both_losses_fall(optimizer):
  cfg = config(optim={'name': optimizer, 'lr_peak': 1e-2})
  one, eight = (curve(cfg, mesh, steps=8) for mesh in ((1, 1, 1), (2, 2, 2)))
  for name in ('train/loss', 'train/mtp_loss'):
    # sums in another order, grown over eight steps
    np.testing.assert_allclose(eight[name], one[name], rtol=2e-4, err_msg=name)
    assert one[name][-1] < one[name][0] - 0.3
  # a module's selection bias moves as a layer's does
  assert (one['router/bias_norm'][0] > 1e-3).all() and one['router/bias_norm'].shape[1] == 3


def test_cost_keeps_the_modules_out_of_the_published_total():
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    shapes = {n: target(config(n)) for n in (0, 2)}
    counts = {n: cost.parameters(config(n).model, s.params) for n, s in shapes.items()}
    assert cost.predicted_bytes(config(2), shapes[2]) > cost.predicted_bytes(config(0), shapes[0])
  assert 'mtp' not in counts[0]
  assert cost.published(counts[2]) == cost.published(counts[0])
  ahead = shapes[2].params['mtp_1'], shapes[2].params['mtp_2']
  assert counts[2]['mtp'].total == sum(leaf.size for leaf in jax.tree.leaves(ahead))
  assert counts[2]['mtp'].active < counts[2]['mtp'].total


def test_config_refuses_more_modules_than_the_sequence_has_tokens():
  with pytest.raises(ValueError, match=r'model\.mtp\.num_modules=12'):
    config(12)
