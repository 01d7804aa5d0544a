"""AdamW against its formula, and what decays."""

import jax.numpy as jnp
import numpy as np
import optax

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


def test_moments_are_float32_whatever_the_gradients():
  params = {'w': jnp.ones(3)}
  tx = adamw(OptimConfig(), steps=10)
  _, state = tx.update({'w': jnp.ones(3)}, tx.init(params), params)
  moments = [leaf for leaf in (state[0].mu['w'], state[0].nu['w'])]
  assert [m.dtype for m in moments] == [jnp.float32, jnp.float32]
