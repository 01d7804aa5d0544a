"""Ideas inside a layer: the same on 8 devices, in micro-batches, and for padding."""

# B batch  S sequence  D model  E experts  F expert width  K experts a token  V token ids

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.config import MoEConfig
from moe_jax.models.attention import Where
from moe_jax.models.moe import MoE
from moe_jax.precision import policy
from moe_jax.routing import Balance, Sizes, choose, ideas
from moe_jax.routing.capacity import Capacity
from tests.routing.gates import make_gate

B, S, D, E, F, K, V = 8, 16, 16, 8, 8, 2, 11
FIELDS = {
  'device_level': {'num_devices': 4},
  'communication': {'num_devices': 4, 'device_limit': 2},
  'capacity': {'factor': 1.0, 'exempt_fraction': 0.3},
}
# those with something to get wrong beyond a mean over sequences
INTRICATE = ('global_batch', 'quantile')
EVERY = [
  pytest.param(name, marks=() if name in INTRICATE else pytest.mark.slow) for name in ideas()
]
MESH = (2, 4, 1)


def layer(name: str, *, training: bool = True, score: str = 'softmax') -> MoE:
  moe = MoEConfig(num_experts=E, top_k=K, d_expert=F, num_shared=0, score=score)
  balance = choose(name, {k: v for k, v in FIELDS.items() if k in name}, moe)
  balance = balance.to_train() if training else balance
  return MoE(moe, balance, 0.5, policy('float32'), V)


def draw() -> tuple[np.ndarray, Where]:
  """A batch whose last rows end in padding."""
  rng = np.random.default_rng(0)
  x_BSD = rng.normal(size=(B, S, D)).astype(np.float32)
  segment_BS = np.ones((B, S), np.int32)
  segment_BS[-2:, 10:] = 0
  token_BS = rng.integers(0, V, (B, S)).astype(np.int32)
  return x_BSD, Where(token_BS, np.zeros_like(token_BS), segment_BS, np.zeros(B, np.int32))


SPECS = {'gate_up_ED2F': sh.EXPERTS_ED2F, 'down_EFD': sh.EXPERTS_EFD, 'router_DE': sh.MATRIX_DX}


@functools.cache
def compiled(name: str, training: bool):
  return jax.jit(layer(name, training=training).apply)


def place(mesh, held: Any, x_BSD, where):
  """Variables and rows on a mesh."""
  put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))
  held = jax.tree_util.tree_map_with_path(
    lambda path, a: put(a, SPECS.get(path[-1].key, jax.P())), held
  )
  return held, *jax.tree.map(lambda a: put(a, jax.P(sh.BATCH)), (x_BSD, where))


@functools.cache
def variables(name: str) -> Any:
  """Random parameters, and for what ideas carry numbers that are not all equal."""
  # by hand: it takes a second to compile `init`
  rng = np.random.default_rng(1)
  shapes = {'router_DE': (D, E), 'gate_up_ED2F': (E, D, 2, F), 'down_EFD': (E, F, D)}
  normal = lambda shape: rng.normal(0, 0.5, shape).astype(np.float32)
  params = {name: normal(shape) for name, shape in shapes.items()}
  move = lambda a: a if a.dtype == np.int32 else a + rng.uniform(0, 0.1, a.shape).astype(a.dtype)
  init = lambda idea: idea.init(jax.random.key(0), Sizes(E, K, D, V))
  carried = {idea.name: jax.tree.map(move, init(idea)) for idea in layer(name).balance.carriers}
  return {'params': params, 'router': {'bias_E': np.zeros(E, np.float32)}, 'ideas': carried}


def apply(name: str, shape=(1, 1, 1), rows=slice(None), counts=None, training=True, x_BSD=None):
  """(y, aux) of some rows of the batch, or of `x_BSD`."""
  drawn_BSD, where = draw()
  x_BSD, where = jax.tree.map(lambda a: a[rows], (drawn_BSD if x_BSD is None else x_BSD, where))
  held = variables(name)
  if counts is not None:
    held = held | {'counts': {'sums': counts}}
  mesh = sh.make_mesh(shape)
  with jax.set_mesh(mesh), jax.default_matmul_precision('highest'):
    out = compiled(name, training)(*place(mesh, held, x_BSD, where))
    return jax.tree.map(np.asarray, out)


whole = functools.cache(apply)


@pytest.mark.slow
@pytest.mark.parametrize('name', [*ideas()])
def test_eight_devices_choose_measure_and_lose_as_one(name):
  (y_BSD, aux), (want_BSD, want) = apply(name, MESH), whole(name)
  # sums in another order, relative to the largest
  np.testing.assert_allclose(y_BSD, want_BSD, rtol=0, atol=1e-6 * np.abs(want_BSD).max())
  for key, value in want.items():
    np.testing.assert_allclose(aux[key], value, rtol=2e-6, atol=2e-6, err_msg=key)


@pytest.mark.parametrize('name', EVERY)
def test_micro_batches_add_up_to_the_batch(name):
  want_BSD, want = whole(name)
  sums = {key: value for key, value in want.items() if '.' in key}
  parts = [apply(name, rows=slice(i, i + 4), counts=sums) for i in (0, 4)]
  np.testing.assert_allclose(np.concatenate([y for y, _ in parts]), want_BSD, atol=1e-5)
  for key, value in want.items():
    total = np.sum([aux[key] for _, aux in parts], axis=0)
    total = total / 2 if key == 'balance_loss' else total
    np.testing.assert_allclose(total, value, rtol=2e-6, atol=2e-6, err_msg=key)


def test_expert_choice_is_balanced_exactly_and_looks_ahead_in_training_only():
  _, aux = whole('expert_choice')
  full_rows = draw()[1].segment_BS.sum(-1) == S
  per_row = K * S // E
  assert full_rows.sum() * per_row <= aux['load_E'].min()
  assert aux['load_E'].max() <= B * per_row
  x_BSD = draw()[0].copy()
  x_BSD[:, -1] = 3.0 * x_BSD[:, 0]
  for training in (True, False):
    (y_BSD, _), (moved_BSD, _) = (
      apply('expert_choice', training=training, x_BSD=x) for x in (None, x_BSD)
    )
    leak = np.abs(y_BSD[:, : S - 1] - moved_BSD[:, : S - 1]).max()
    assert leak > 1e-3 if training else leak == 0


def test_capacity_bounds_every_expert_of_a_sequence_and_drops_the_lowest_scores():
  gate = make_gate(np.random.default_rng(0).normal(size=(3, 40, 16)), 'softmax', 4, bias_E=0.02)
  kept_BSK = np.asarray(jax.jit(lambda: Capacity(factor=1.0).limit(gate, {}))())
  chosen_BSK, score_BSE = np.asarray(gate.expert_BSK), np.asarray(gate.score_BSE)
  bound = 4 * 40 // 16
  for row in range(3):
    for e in range(16):
      asked = score_BSE[row, (chosen_BSK[row] == e).any(-1), e]
      kept = score_BSE[row, (kept_BSK[row] == e).any(-1), e]
      assert len(kept) == min(bound, len(asked))
      np.testing.assert_array_equal(np.sort(kept), np.sort(asked)[len(asked) - len(kept) :])


def test_capacity_of_devices_bounds_their_experts_together_and_exempts_whole_sequences():
  logits_BSE = np.random.default_rng(0).normal(size=(200, 8, 16))
  gate = make_gate(logits_BSE, 'softmax', 4)
  gate = gate._replace(token_BS=jnp.asarray(np.random.default_rng(1).integers(0, 999, (200, 8))))
  kept_BSK = np.asarray(Capacity(factor=1.0, num_devices=4, exempt_fraction=0.3).limit(gate, {}))
  dropped_B = (kept_BSK == 16).any((1, 2))
  load_BG = np.stack([(kept_BSK // 4 == g).sum((1, 2)) for g in range(4)], -1)
  assert (load_BG[dropped_B] <= 8).all()
  exempt_B = (load_BG > 8).any(-1)
  assert 0.15 < exempt_B.mean() < 0.4 and not (exempt_B & dropped_B).any()


def test_capacity_drops_in_training_only_and_the_share_is_measured():
  aux = whole('capacity')[1]
  assert 0 < aux['dropped'] < aux['choices'] == aux['tokens'] * K
  y_BSD, evaluated = apply('capacity', training=False)
  assert evaluated['dropped'] == 0
  assert np.abs(y_BSD - whole('capacity')[0]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(set(ideas()) - {'capacity'}))
def test_capacity_goes_with_every_idea(name):
  y_BSD, aux = apply(f'{name}+capacity')
  assert np.isfinite(y_BSD).all() and aux['dropped'] <= aux['choices']
  # experts that choose are even already
  assert (aux['dropped'] > whole(name)[1]['dropped']) == (name != 'expert_choice')


def test_default_expert_adds_the_averages_of_experts_not_chosen():
  y_BSD, aux = whole('default_expert')
  plain_BSD, _ = whole('z_loss')  # the same parameters: ideas draw no keys here
  held = variables('default_expert')
  x_BSD, _ = draw()
  logits = x_BSD @ held['params']['router_DE']
  p_BSE = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  low_BSE = p_BSE < np.sort(p_BSE, -1)[..., -K:-K+1]  # fmt: skip
  want_BSD = np.einsum(
    'bse,ed->bsd', p_BSE * low_BSE, held['ideas']['default_expert']['default_ED']
  )
  np.testing.assert_allclose(y_BSD - plain_BSD, want_BSD, atol=2e-6)
  np.testing.assert_allclose(aux['default_expert.count_E'], aux['load_E'])


def test_relu_weighs_by_the_positive_logits_and_leaves_the_others_out():
  _, aux = whole('relu')
  x_BSD, where = draw()
  logits = x_BSD @ variables('relu')['params']['router_DE']
  active_BS = (logits > 0).sum(-1)
  valid_BS = where.segment_BS > 0
  assert aux['relu.active'] == active_BS[valid_BS].sum()
  assert aux['choices'] == np.minimum(active_BS, 2 * K)[valid_BS].sum()


def test_hash_chooses_by_the_token_alone():
  _, aux = apply('hash', training=False)
  token_BS, chosen_BSK = draw()[1].token_BS, aux['chosen_BSK']
  for token in range(V):
    assert len(np.unique(chosen_BSK[token_BS == token], axis=0)) == 1
  assert all(len(set(experts)) == K for experts in chosen_BSK.reshape(-1, K))


def test_the_average_of_default_expert_leaves_out_nothing_that_capacity_drops():
  _, dropping = apply('default_expert+capacity')
  _, want = whole('default_expert')
  assert dropping['dropped'] > 0
  for key in ('default_expert.count_E', 'default_expert.output_ED'):
    np.testing.assert_allclose(dropping[key], want[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['z_loss', 'default_expert'])
def test_experts_multiply_in_the_precision_of_the_policy(name):
  # FP8 is for widths of whole blocks of 128
  wide = MoEConfig(num_experts=E, top_k=K, d_expert=128, num_shared=0)
  module = layer(name).clone(cfg=wide, policy=policy('fp8_block'))
  mesh = sh.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    _, x_BSD, where = place(mesh, {}, np.ones((B, S, 128), np.float32), draw()[1])
    made = jax.eval_shape(module.init, jax.random.key(0), x_BSD, where)
    assert 'f8_e4m3' in str(jax.make_jaxpr(module.apply)(made, x_BSD, where))


@pytest.mark.parametrize('name', ['loss_free', 'phi'])
def test_the_variables_of_these_tests_are_those_that_init_makes(name):
  mesh = sh.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    _, x_BSD, where = place(mesh, {}, *draw())
    made = jax.eval_shape(layer(name).init, jax.random.key(0), x_BSD, where)
  shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
  assert shapes({'ideas': {}} | made) == shapes(variables(name))


def test_ideas_without_memory_carry_nothing():
  assert Balance().carriers == () and variables('loss_free')['ideas'] == {}
