"""The indexer learns from its own loss, the model from the language loss, and freezing freezes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import sharding as sh
from moe_jax.config import (
  DataConfig,
  DSAConfig,
  ModelConfig,
  MoEConfig,
  OptimConfig,
  RunConfig,
)
from moe_jax.models.attention import Where
from moe_jax.optim import only, trains
from moe_jax.train.state import create, make_model
from moe_jax.train.step import count_targets, make_train_step, mean_loss

ROWS, LENGTH, VOCABULARY, TOP_K = 8, 12, 40, 4
SEGMENT = np.array([1] * 7 + [2] * 4 + [0])  # two documents and a padded place
POSITION = np.array([*range(7), *range(4), 0])


def run_config(stage: str, *, trainable: str = '', num_dense: int = 1) -> RunConfig:
  dsa = DSAConfig(
    num_heads=2, d_nope=8, d_rope=4, d_value=8, kv_rank=16, q_rank=16, num_index_heads=8,
    d_index=8, index_top_k=TOP_K, stage=stage,
  )  # fmt: skip
  model = ModelConfig(
    vocab_size=VOCABULARY,
    d_model=16,
    num_layers=1,
    num_dense_layers=num_dense,
    d_ff=24,
    attention='dsa',
    init_std=0.3,
    dsa=dsa,
    moe=MoEConfig(num_experts=8, top_k=2, d_expert=8),
  )
  return RunConfig(
    model=model,
    balance='loss_free',
    optim=OptimConfig(trainable=trainable, warmup_steps=0, schedule='constant', lr_peak=1e-2),
    data=DataConfig(batch_size=ROWS, sequence_length=LENGTH),
  )


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), jax.default_matmul_precision('highest'):
    yield


def draw_batch() -> dict[str, jax.Array]:
  token = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH + 1))
  rows = lambda a: np.tile(a, (ROWS, 1))
  batch = {
    'tokens': token[:, :-1],
    'targets': token[:, 1:],
    'segments': rows(SEGMENT),
    'positions': rows(POSITION),
  }
  batch = {name: jax.device_put(a.astype(np.int32), sh.TOKENS) for name, a in batch.items()}
  return batch | {'loss_mask': batch['segments'] > 0}


def gradients(cfg: RunConfig) -> list[dict[str, jax.Array]]:
  """Gradients of the indexer's loss and of the language loss, by path."""
  state, batch = jax.jit(functools.partial(create, cfg))(jax.random.key(0)), draw_batch()
  model = make_model(cfg)

  @jax.jit
  def grads(params):
    targets = count_targets(cfg, batch)
    losses = lambda p: mean_loss(cfg, model, p, state.rest, batch, num_targets=targets)[1]
    seen, pull = jax.vjp(lambda p: [losses(p)[n] for n in ('indexer_loss', 'lm_loss')], params)
    one, zero = jnp.ones_like(seen[0]), jnp.zeros_like(seen[0])
    return pull([one, zero])[0], pull([zero, one])[0]

  leaves = jax.tree_util.tree_leaves_with_path
  return [{jax.tree_util.keystr(p): g for p, g in leaves(t)} for t in grads(state.params)]


@pytest.mark.parametrize('stage', ['dense_warmup', 'sparse'])
def test_indexer_learns_only_from_its_loss_and_the_model_never_does(stage):
  of_indexer, of_language = gradients(run_config(stage))
  assert sum('indexer' in path for path in of_indexer) == 5
  for path in of_indexer:
    to, away = (of_indexer, of_language) if 'indexer' in path else (of_language, of_indexer)
    assert np.abs(to[path]).max() > 0, path
    assert not np.any(away[path]), path


def softmax(score):
  e = np.exp(score - score.max())
  return e / e.sum()


def rms(x, weight):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def turn(x, position, *, halves: bool):
  """Rotary embedding of one vector, in float64."""
  n = x.size
  angle = position * 10_000.0 ** (-np.arange(0, n, 2) / n)
  a, b = (x[: n // 2], x[n // 2 :]) if halves else (x[0::2], x[1::2])
  first, second = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
  if halves:
    return np.concatenate([first, second])
  return np.stack([first, second], -1).reshape(-1)


def expected_loss(cfg: RunConfig, params, token_S: np.ndarray) -> float:
  """The mean over tokens of the KL, token by token and head by head, in float64."""
  c = cfg.model.dsa
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  layer = jax.tree.map(lambda a: a[0], p['group_0']['layer_0'])
  a, index = layer['attention'], layer['attention']['indexer']
  x = rms(p['embedding_VD'][token_S], layer['attention_norm']['weight_D'])
  c_q = rms(x @ a['q_down_DQ'], a['q_norm']['weight_D'])
  down = x @ a['kv_down_DX']
  latent = rms(down[:, : c.kv_rank], a['kv_norm']['weight_D'])
  k_index = x @ index['key_DI']
  k_index = k_index - k_index.mean(-1, keepdims=True)
  k_index = k_index / np.sqrt((k_index**2).mean(-1, keepdims=True) + 1e-6)
  k_index = k_index * index['k_norm']['weight_D'] + index['k_norm']['bias_D']
  w = x @ index['head_DJ'] * c.num_index_heads**-0.5

  def rotated_index(vector, t):
    return np.concatenate([turn(vector[: c.d_rope], POSITION[t], halves=True), vector[c.d_rope :]])

  total = 0.0
  tokens = np.flatnonzero(SEGMENT)
  for t in tokens:
    keys = [s for s in range(t + 1) if SEGMENT[s] == SEGMENT[t]]
    score = []
    for s in keys:
      dots = [
        rotated_index(c_q[t] @ index['query_QJI'][:, j], t) @ rotated_index(k_index[s], s)
        for j in range(c.num_index_heads)
      ]
      score.append((w[t] * np.maximum(dots, 0)).sum() * c.d_index**-0.5)
    if c.stage == 'sparse' and len(keys) > c.index_top_k:
      best = sorted(np.argsort(score)[::-1][: c.index_top_k])
      keys, score = [keys[i] for i in best], [score[i] for i in best]
    target = np.zeros(len(keys))
    for h in range(c.num_heads):
      q = c_q[t] @ a['q_up_QHX'][:, h]
      q_rope = turn(q[c.d_nope :], POSITION[t], halves=False)
      logit = [
        q[: c.d_nope] @ (latent[s] @ a['key_up_RHN'][:, h])
        + q_rope @ turn(down[s, c.kv_rank :], POSITION[s], halves=False)
        for s in keys
      ]
      target += softmax(np.array(logit) * (c.d_nope + c.d_rope) ** -0.5)
    target /= target.sum()
    total += (target * np.log(target / softmax(np.array(score)))).sum()
  return total / tokens.size


@pytest.mark.parametrize('stage', ['dense_warmup', 'sparse'])
def test_indexer_loss_equals_a_computation_token_by_token(stage):
  cfg, batch = run_config(stage), draw_batch()
  state = jax.jit(functools.partial(create, cfg))(jax.random.key(0))
  start_B = jnp.zeros_like(batch['tokens'][:, 0])
  where = Where(batch['tokens'], batch['positions'], batch['segments'], start_B)
  variables = state.variables
  aux = jax.jit(lambda v, w: make_model(cfg).apply(v, w).aux)(variables, where)
  rows = [expected_loss(cfg, state.params, row) for row in np.asarray(batch['tokens'])]
  assert aux['indexer_loss'].shape == (1,)
  print(stage, aux['indexer_loss'], np.mean(rows))
  # float32 against float64
  np.testing.assert_allclose(aux['indexer_loss'][0], np.mean(rows), rtol=1e-5)


def test_warmup_moves_nothing_but_the_indexer_and_lowers_its_loss():
  cfg = run_config('dense_warmup', trainable='indexer', num_dense=0)
  state = jax.jit(functools.partial(create, cfg))(jax.random.key(0))
  step, batch = jax.jit(make_train_step(cfg)), draw_batch()
  new, losses = state, []
  for _ in range(30):
    new, metrics = step(new, batch)
    losses.append(float(metrics['train/indexer_loss']))
  print(losses[0], losses[-1])
  assert losses[-1] < losses[0] / 2
  old_leaves = jax.tree_util.tree_leaves_with_path((state.params, state.router))
  for (path, old), leaf in zip(old_leaves, jax.tree.leaves((new.params, new.router)), strict=True):
    name = jax.tree_util.keystr(path)
    assert np.array_equal(old, leaf) == ('indexer' not in name), name
  # moments are kept for the indexer alone
  moments = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(new.opt)}
  assert not any('q_up_QHX' in name for name in moments)


def test_trains_finds_a_pattern_in_the_path():
  tree = {'a': {'indexer': {'key_DI': 0}, 'q_up': 0}}
  assert trains('indexer/key', tree) == {'a': {'indexer': {'key_DI': True}, 'q_up': False}}
  assert all(jax.tree.leaves(trains('', tree)))


def test_only_refuses_a_pattern_that_is_found_nowhere():
  with pytest.raises(ValueError, match="trainable='idxer' is found in the path of no parameter"):
    only(optax.sgd(1.0), 'idxer').init({'indexer': jnp.zeros(2)})


def test_optim_refuses_a_broken_pattern():
  with pytest.raises(ValueError, match='is no regular expression'):
    OptimConfig(trainable='[')
