"""The decoder: no leaks, packing, scanning, remat, dtypes, and counts by hand."""

# B batch  S sequence  D model  V vocabulary  L layers

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.config import (
  DataConfig,
  FullAttentionConfig,
  MLAConfig,
  ModelConfig,
  MoEConfig,
  RopeConfig,
  RunConfig,
)
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Block, Decoder
from moe_jax.models.layers import RMSNorm
from moe_jax.precision import policy
from moe_jax.routing import choose
from moe_jax.train import cost
from moe_jax.train.state import create

B, S = 2, 12
IDEAS = choose('loss_free+sequence_wise', {}, MoEConfig())

# V3: MLA, sigmoid scores, groups kept by their two best
V3 = ModelConfig(
  vocab_size=40,
  d_model=16,
  num_layers=3,
  d_ff=24,
  init_std=0.2,
  mla=MLAConfig(num_heads=2, d_nope=8, d_rope=4, d_value=6, kv_rank=10, q_rank=12),
  moe=MoEConfig(num_experts=8, top_k=3, d_expert=8, num_groups=4, top_groups=2, weight_scale=2.5),
  rope=RopeConfig(yarn_factor=4.0, yarn_original_length=8),
)
# V1: full attention, softmax scores, weights as they are, two shared experts
V1 = dataclasses.replace(
  V3,
  attention='full',
  full=FullAttentionConfig(num_heads=2, d_head=8),
  moe=MoEConfig(
    num_experts=8, top_k=3, d_expert=8, num_shared=2, score='softmax', normalize_weights=False
  ),
  rope=RopeConfig(),
)
# V2: device limit by the largest score, queries straight from the input
V2 = dataclasses.replace(
  V3,
  mla=dataclasses.replace(V3.mla, q_rank=0),
  moe=MoEConfig(
    num_experts=8,
    top_k=3,
    d_expert=8,
    num_shared=2,
    score='softmax',
    num_groups=4,
    top_groups=3,
    group_score='max',
    normalize_weights=False,
    weight_scale=16.0,
  ),
)
MODELS = {'v1': V1, 'v2': V2, 'v3': V3}
EACH = pytest.mark.parametrize('name', MODELS)


@pytest.fixture(autouse=True)
def on_one_device():
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), jax.default_matmul_precision('highest'):
    yield


def make_where(token_BS, segment_BS=None, position_BS=None) -> Where:
  rows, length = token_BS.shape
  if segment_BS is None:
    segment_BS = np.ones((rows, length), np.int32)
  if position_BS is None:
    position_BS = np.tile(np.arange(length), (rows, 1))
  split = lambda a: jax.device_put(jnp.asarray(a, jnp.int32), sh.TOKENS)
  start_B = jax.device_put(jnp.zeros(rows, jnp.int32), sh.BY_ROW)
  return Where(split(token_BS), split(position_BS), split(segment_BS), start_B)


def make_tokens(rows=B, seed=0):
  return np.random.default_rng(seed).integers(0, 40, (rows, S))


def make_model(name, precision='float32', **changes) -> Decoder:
  return Decoder(dataclasses.replace(MODELS[name], **changes), policy(precision), IDEAS)


@functools.cache
def variables(name):
  """Every number random, biases and the scales of norms too, and nothing to compile."""
  shapes = jax.eval_shape(make_model(name).init, jax.random.key(0), make_where(make_tokens()))
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'weight_D' else 0.0
    values = rng.normal(mean, 0.2, leaf.shape).astype(np.float32)
    return jax.device_put(values, leaf.sharding.spec)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def compiled(name):
  return jax.jit(lambda values, where: make_model(name).apply(values, where))


def run(name, where):
  return compiled(name)(variables(name), where)


@EACH
def test_no_position_sees_a_later_token(name):
  tokens = make_tokens()
  hidden = np.asarray(run(name, make_where(tokens)).hidden_BSD)
  for cut in (1, S // 2, S - 1):
    changed = tokens.copy()
    changed[:, cut:] = (changed[:, cut:] + 1) % 40
    found = np.asarray(run(name, make_where(changed)).hidden_BSD)
    # the experts' matrix products group other rows together, so the last bit may differ
    np.testing.assert_allclose(found[:, :cut], hidden[:, :cut], atol=1e-5)
    assert np.abs(found[:, cut:] - hidden[:, cut:]).max() > 0.1


@EACH
def test_every_position_sees_the_first_token(name):
  tokens = make_tokens()
  changed = tokens.copy()
  changed[:, 0] = (changed[:, 0] + 1) % 40
  a, b = (np.asarray(run(name, make_where(t)).hidden_BSD) for t in (tokens, changed))
  assert (np.abs(a - b).max(-1) > 1e-4).all()


@EACH
def test_packed_documents_equal_the_documents_alone(name):
  tokens, border = make_tokens(), 5
  segments = np.ones((B, S), int)
  segments[:, border:] = 2
  positions = np.tile(np.arange(S), (B, 1))
  positions[:, border:] -= border
  packed = np.asarray(run(name, make_where(tokens, segments, positions)).hidden_BSD)

  for first, last in ((0, border), (border, S)):
    # padded behind to the packed length, so that nothing is compiled again
    alone, length = np.zeros((B, S), int), last - first
    alone[:, :length] = tokens[:, first:last]
    padding = np.where(np.arange(S) < length, 1, 0) + np.zeros((B, 1), int)
    found = np.asarray(run(name, make_where(alone, padding)).hidden_BSD)
    np.testing.assert_allclose(found[:, :length], packed[:, first:last], atol=1e-5)


@EACH
def test_padding_is_counted_nowhere(name):
  segments = np.ones((B, S), int)
  segments[0, 7:] = 0
  aux = run(name, make_where(make_tokens(), segments)).aux
  np.testing.assert_array_equal(aux['load_E'].sum(-1), [(S + 7) * 3] * 2)
  # and what stands there moves no loss
  tokens = make_tokens()
  tokens[0, 7:] = 0
  other = run(name, make_where(tokens, segments)).aux
  # padding has choices too, which nobody counts
  same = lambda aux: aux | {'chosen_BSK': np.where(segments[..., None] > 0, aux['chosen_BSK'], 0)}
  for key, value in same(aux).items():
    np.testing.assert_allclose(same(other)[key], value, rtol=1e-5, err_msg=key)


@EACH
def test_scan_equals_the_layers_one_by_one(name):
  cfg, values, where = MODELS[name], variables(name), make_where(make_tokens())
  params, router = values['params'], values['router']
  x_BSD = jax.device_put(np.asarray(params['embedding_VD'])[make_tokens()], sh.STREAM)
  loads = []

  @functools.cache
  def block(kind):
    return jax.jit(Block(kind, cfg, IDEAS, policy('float32')).apply)

  # layer 0 is dense, layers 1 and 2 are the two turns of the second scan
  for i, (group, turn) in enumerate([('group_0', 0), ('group_1', 0), ('group_1', 1)]):
    slices = {'params': params, 'router': router} if group == 'group_1' else {'params': params}
    one = {
      collection: jax.tree.map(lambda a, t=turn: a[t], tree[group]['layer_0'])
      for collection, tree in slices.items()
    }
    x_BSD, _, aux = block(cfg.layers[i])(one, x_BSD, where, None)
    if 'load_E' in aux:
      loads.append(aux['load_E'])
  norm = RMSNorm(cfg.norm_eps)
  hidden_BSD = norm.apply({'params': params['final_norm']}, x_BSD)

  out = run(name, where)
  np.testing.assert_allclose(out.hidden_BSD, hidden_BSD, atol=2e-5)
  np.testing.assert_array_equal(out.aux['load_E'], np.stack(loads))


def gradient(**changes):
  """Of one scalar of what V3 returns."""
  model = make_model('v3', **changes)
  dout_BSD = np.random.default_rng(2).normal(size=(B, S, 16)).astype(np.float32)

  def loss(values):
    out = model.apply(values, make_where(make_tokens()))
    return (out.hidden_BSD * dout_BSD).sum() + out.aux['balance_loss'].sum()

  return jax.jit(jax.grad(loss))(variables('v3'))


@pytest.fixture(scope='module')
def gradients():
  """Under each remat policy."""
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), jax.default_matmul_precision('highest'):
    return {remat: gradient(remat=remat) for remat in ('none', 'full', 'dots', 'light')}


def test_everything_learnable_gets_a_gradient_and_the_bias_none(gradients):
  for path, grad in jax.tree_util.tree_leaves_with_path(gradients['none']):
    unused = path[-1].key in ('bias_E', 'head_DV')  # the head is the loss's, which is not here
    assert (np.abs(grad).max() > 0) != unused, jax.tree_util.keystr(path)


def assert_same(got, want):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True
  ):
    # what is computed again is fused in other ways
    atol = 1e-5 * np.abs(a).max()
    np.testing.assert_allclose(b, a, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize('remat', ['full', 'dots', 'light'])
def test_remat_changes_no_gradient(gradients, remat):
  assert_same(gradients[remat], gradients['none'])


@pytest.mark.slow
@pytest.mark.parametrize('strict', [False, True])
def test_unrolling_changes_no_gradient(gradients, strict):
  assert_same(gradient(remat='light', unroll_layers=True, strict_remat=strict), gradients['none'])


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_policy_decides_the_stream_and_leaves_the_rest_in_float32(precision):
  model = make_model('v3', precision)
  out = jax.eval_shape(model.apply, variables('v3'), make_where(make_tokens()))
  assert out.hidden_BSD.dtype == jnp.dtype(precision)
  assert out.aux.pop('chosen_BSK').dtype == jnp.int32
  assert {a.dtype for a in jax.tree.leaves(out.aux)} == {jnp.dtype('float32')}
  fresh = jax.eval_shape(model.init, jax.random.key(0), make_where(make_tokens()))
  assert {a.dtype for a in jax.tree.leaves(fresh)} == {jnp.dtype('float32')}


def test_bfloat16_stays_close_to_float32():
  where = make_where(make_tokens())
  exact = np.asarray(run('v1', where).hidden_BSD)
  rough = make_model('v1', 'bfloat16').apply(variables('v1'), where).hidden_BSD
  # 3 layers of values near 1 with 8 bits; a token that changes an expert would differ by more
  assert np.median(np.abs(np.asarray(rough, np.float32) - exact)) < 0.02


def shapes(cfg: ModelConfig):
  run_cfg = RunConfig(model=cfg, data=DataConfig(batch_size=1))
  return jax.eval_shape(functools.partial(create, run_cfg), jax.random.key(0)).params


def test_parameters_equal_a_count_by_hand():
  counts = cost.parameters(V3, shapes(V3))
  D, V, R, Q, C, N, W = 16, 40, 10, 12, 4, 8, 6
  heads, layers, moe_layers = 2, 3, 2
  attention = D * Q + Q * heads * (N + C) + D * (R + C) + R * heads * (N + W) + heads * W * D
  attention += R + Q  # the norms of the two latents
  assert counts['embedding'].total == counts['output head'].total == V * D
  assert counts['attention'].total == layers * attention
  assert counts['norms'].total == (2 * layers + 1) * D
  assert counts['dense feed-forward'].total == 3 * D * 24
  assert counts['shared experts'].total == moe_layers * 3 * D * 8
  assert counts['routed experts'] == (moe_layers * 8 * 3 * D * 8, moe_layers * 3 * 3 * D * 8)
  assert counts['router'].total == moe_layers * D * 8


@pytest.mark.parametrize(
  ('cfg', 'total', 'active'),
  [
    pytest.param(
      ModelConfig(
        vocab_size=102_400,
        d_model=2048,
        num_layers=28,
        num_dense_layers=1,
        d_ff=10_944,
        attention='full',
        full=FullAttentionConfig(num_heads=16, d_head=128),
        moe=MoEConfig(num_experts=64, top_k=6, d_expert=1408, num_shared=2, score='softmax'),
      ),
      16.38e9,
      2.83e9,
      id='DeepSeekMoE-16B',
    ),
    pytest.param(
      ModelConfig(
        vocab_size=102_400,
        d_model=2048,
        num_layers=27,
        num_dense_layers=1,
        d_ff=10_944,
        mla=MLAConfig(num_heads=16, d_nope=128, d_rope=64, d_value=128, kv_rank=512),
        moe=MoEConfig(num_experts=64, top_k=6, d_expert=1408, num_shared=2, score='softmax'),
      ),
      15.71e9,
      2.66e9,
      id='DeepSeek-V2-Lite',
    ),
    pytest.param(
      ModelConfig(
        vocab_size=129_280,
        d_model=7168,
        num_layers=61,
        num_dense_layers=3,
        d_ff=18_432,
        mla=MLAConfig(num_heads=128, d_nope=128, d_rope=64, d_value=128, kv_rank=512, q_rank=1536),
        moe=MoEConfig(num_experts=256, top_k=8, d_expert=2048, num_shared=1),
      ),
      671.03e9,
      37.55e9,
      id='DeepSeek-V3',
    ),
  ],
)
def test_released_sizes_are_those_of_the_released_models(cfg, total, active):
  counts = cost.parameters(cfg, shapes(cfg)).values()
  # published to four digits
  assert sum(c.total for c in counts) == pytest.approx(total, rel=5e-4)
  assert sum(c.active for c in counts) == pytest.approx(active, rel=3e-3)
