"""Every idea trains a tiny model, and those that promise balance keep it where `none` loses it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.config import DataConfig, MoEConfig, OptimConfig, RunConfig
from moe_jax.routing import ideas
from moe_jax.train.state import create
from moe_jax.train.step import make_train_step
from tests.multi_device.test_equal_meshes import MODEL, B, S, on_mesh

pytestmark = pytest.mark.slow

STEPS = 30
FIELDS = {
  'device_level': {'num_devices': 4},
  'communication': {'num_devices': 4, 'device_limit': 2},
  'expert_level': {'weight': 0.1},
  'switch': {'weight': 0.1},
  'global_batch': {'weight': 0.1},
  'sequence_wise': {'weight': 0.1},
  'phi': {'weight': 0.1},
  'gshard': {'weight': 1.0},
  'loss_free': {'rate': 0.02},
  'smebu': {'rate': 0.02},
  'relu': {'lambda_start': 1e-3},
}
# what the papers claim of the load; the others act on devices, logits, or what a token gets
BALANCES = (
  'expert_level', 'switch', 'global_batch', 'sequence_wise', 'gshard', 'loss_free', 'smebu',
  'quantile', 'expert_choice', 'sinkhorn', 'phi',
)  # fmt: skip


@functools.cache
def train(name: str) -> dict[str, np.ndarray]:
  """The metrics of some steps on one batch, by name."""
  cfg = RunConfig(
    model=dataclasses.replace(MODEL, moe=MoEConfig(num_experts=8, top_k=2, d_expert=8)),
    steps=STEPS,
    balance=name,
    routing={k: v for k, v in FIELDS.items() if k == name},
    optim=OptimConfig(lr_peak=2e-2, warmup_steps=3),
    data=DataConfig(batch_size=B, sequence_length=S),
  )
  mesh = sh.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    state = jax.jit(functools.partial(create, cfg))(jax.random.key(0))
  step, rows = jax.jit(make_train_step(cfg)), []
  for _ in range(STEPS):
    state, metrics = on_mesh(mesh, step, state)
    rows.append(jax.tree.map(np.asarray, metrics))
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize('name', [*ideas()])
def test_the_loss_falls_under_every_idea(name):
  loss = train(name)['train/lm_loss']
  assert np.isfinite(loss).all() and loss[-1] < loss[0] - 0.3


@pytest.mark.parametrize('name', BALANCES)
def test_the_load_is_more_even_than_without(name):
  at_the_end = lambda n: train(n)['router/load_cv'][-5:].mean()
  assert at_the_end(name) < 0.8 * at_the_end('none')
