"""AdamW against its formula, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import OptimConfig
from moe_jax.optim import adamw
from moe_jax.optim.adamw import decays


def test_decay_spares_the_scales_of_norms_alone():
  params = {
    'embedding_VD': 0,
    'layer_0': {'attention_norm': {'weight_D': 0}, 'moe': {'router_DE': 0, 'down_EFD': 0}},
  }
  assert decays(params) == {
    'embedding_VD': True,
    'layer_0': {
      'attention_norm': {'weight_D': False},
      'moe': {'router_DE': True, 'down_EFD': True},
    },
  }


def test_two_steps_equal_the_formula():
  cfg = OptimConfig(lr_peak=0.01, schedule='constant', warmup_steps=2, weight_decay=0.1)
  tx = adamw(cfg, steps=10)
  params = {'w': jnp.array([1.0, -2.0]), 'norm': {'weight_D': jnp.array([1.0, 1.0])}}
  grads = [{'w': jnp.array([0.5, 0.1]), 'norm': {'weight_D': jnp.array([-0.2, 3.0])}}] * 2
  state = tx.init(params)
  found = params
  for grad in grads:
    updates, state = tx.update(grad, state, found)
    found = optax.apply_updates(found, updates)

  for path, decay in ((('w',), 0.1), (('norm', 'weight_D'), 0.0)):
    pick = lambda tree, path=path: np.asarray(
      tree[path[0]] if len(path) == 1 else tree[path[0]][path[1]], np.float64
    )
    p, m, v = pick(params), 0.0, 0.0
    for i, grad in enumerate(grads, start=1):
      g = pick(grad)
      m, v = cfg.b1 * m + (1 - cfg.b1) * g, cfg.b2 * v + (1 - cfg.b2) * g**2
      step = m / (1 - cfg.b1**i) / (np.sqrt(v / (1 - cfg.b2**i)) + cfg.eps)
      p = p - cfg.lr_peak * i / 2 * (step + decay * p)
    np.testing.assert_allclose(pick(found), p, rtol=1e-6)


@pytest.mark.parametrize(('rounding', 'expected'), [('stochastic', 1.0), ('nearest', 0.75)])
def test_bfloat16_moments_follow_slow_changes_only_when_rounded_by_chance(rounding, expected):
  """With b2 = 0.999 a step changes a moment by less than half of a bfloat16's last bit."""
  cfg = OptimConfig(b2=0.999, moments_dtype='bfloat16', moments_rounding=rounding)
  tx = adamw(cfg, steps=10_000, seed=3)
  params = {'w': jnp.zeros(4096)}
  grads = {'w': jnp.ones(4096)}

  def step(state, _):
    return tx.update(grads, state, params)[1], None

  state, _ = jax.jit(lambda s: jax.lax.scan(step, s, length=5000))(tx.init(params))
  assert state[0].nu['w'].dtype == jnp.bfloat16
  # 1 - 0.999^5000 = 0.993; to nearest, it stops where 0.001 (1 - v) is below half a last bit
  mean = float(state[0].nu['w'].astype(jnp.float32).mean())
  assert mean > 0.98 if rounding == 'stochastic' else mean < expected


def test_bfloat16_moments_give_nearly_the_same_updates():
  params = {'w': jax.random.normal(jax.random.key(0), (64, 64))}
  wide, narrow = (adamw(OptimConfig(moments_dtype=d), 100) for d in ('float32', 'bfloat16'))
  states = [tx.init(params) for tx in (wide, narrow)]
  for i in range(5):
    grads = {'w': jax.random.normal(jax.random.key(i), (64, 64))}
    (exact, states[0]), (rounded, states[1]) = (
      tx.update(grads, state, params) for tx, state in zip((wide, narrow), states, strict=True)
    )
  error = np.linalg.norm(rounded['w'] - exact['w']) / np.linalg.norm(exact['w'])
  # a moment is off by up to 2^-8 of itself after each of the steps
  assert 1e-5 < error < 2**-7


def test_moments_are_float32_whatever_the_gradients():
  params = {'w': jnp.ones(3)}
  tx = adamw(OptimConfig(), steps=10)
  _, state = tx.update({'w': jnp.ones(3)}, tx.init(params), params)
  moments = [leaf for leaf in (state[0].mu['w'], state[0].nu['w'])]
  assert [m.dtype for m in moments] == [jnp.float32, jnp.float32]
