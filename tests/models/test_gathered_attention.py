"""DSA by gathering equals DSA by masks: values, gradients, losses, and decoding over a cache."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.config import DSAConfig
from moe_jax.models.attention import dsa, gathered
from moe_jax.models.decoder import Decoder
from moe_jax.precision import policy
from tests.models import kinds

IDS = np.random.default_rng(0).integers(0, kinds.VOCABULARY, (2, 14))
# two documents and padding
SEGMENT = np.array([[1] * 9 + [2] * 5, [1] * 12 + [0] * 2])
POSITION = np.array([[*range(9), *range(5)], [*range(12), 0, 1]])
CFG = kinds.tiny('dsa', num_layers=1, num_dense_layers=1)


def loss_and_gradient(stage: str, mesh: tuple[int, int, int]):
  cfg = dataclasses.replace(CFG, dsa=dataclasses.replace(CFG.dsa, stage=stage))
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    initial = kinds.initial(cfg)
  with jax.set_mesh(sh.make_mesh(mesh)), jax.default_matmul_precision('highest'):
    variables = kinds.on_mesh(cfg, initial)
    where = kinds.where_of(IDS, SEGMENT, POSITION)

    def loss(variables):
      out: Any = Decoder(cfg, kinds.POLICY).apply(variables, where)
      return (out.hidden_BSD**2).sum() + 3 * out.aux['indexer_loss'].sum()

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(variables))


def same(got, exact):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
    # float32 sums in another order, relative to the largest
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(1, 1, 1), (2, 1, 2)])
def test_gathered_training_equals_masked(monkeypatch, mesh):
  exact = loss_and_gradient('sparse', (1, 1, 1))
  monkeypatch.setattr(gathered, 'serves', lambda *_: True)
  same(loss_and_gradient('sparse', mesh), exact)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(1, 1, 1), (2, 1, 2)])
def test_warmup_in_chunks_equals_masked(monkeypatch, mesh):
  exact = loss_and_gradient('dense_warmup', (1, 1, 1))
  monkeypatch.setattr(dsa, '_LONG', 8)
  same(loss_and_gradient('dense_warmup', mesh), exact)


@pytest.mark.slow
def test_decoding_over_gathered_places_equals_masked(monkeypatch):
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), jax.default_matmul_precision('highest'):
    variables = kinds.on_mesh(CFG)
    run = lambda: list(kinds.decoded(CFG, variables, IDS, prompts=[1, 9], room=16))
    exact = run()
    monkeypatch.setattr(gathered, 'serves', lambda *_: True)
    monkeypatch.setattr(gathered, '_FEW', 4)
    same(run(), exact)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU')
def test_kernels_train_as_masks_do(monkeypatch):
  dsa_cfg = DSAConfig(
    num_heads=16, d_nope=64, d_rope=64, d_value=64, kv_rank=512, q_rank=128, num_index_heads=16,
    d_index=128, index_top_k=128,
  )  # fmt: skip
  cfg = kinds.tiny('dsa', d_model=128, num_layers=1, num_dense_layers=1, dsa=dsa_cfg)
  ids = np.random.default_rng(0).integers(0, kinds.VOCABULARY, (2, 512))
  place = np.tile(np.arange(512), (2, 1))
  # two documents, and padding
  segment, position = np.ones_like(place), place.copy()
  segment[0, 300:], segment[1, 400:] = 2, 0
  position[0, 300:] -= 300

  def gradient(by_kernels: bool, precision: str):
    monkeypatch.setattr(gathered, 'serves', lambda *_: by_kernels)
    matmuls = jax.default_matmul_precision('highest' if precision == 'float32' else 'default')
    with jax.set_mesh(sh.make_mesh((1, 1, 1))), matmuls:
      where = kinds.where_of(ids, segment, position)

      def loss(variables):
        out: Any = Decoder(cfg, policy(precision)).apply(variables, where)
        wide = out.hidden_BSD.astype(np.float32)
        return (wide**4).mean() + 3 * out.aux['indexer_loss'].sum()

      return jax.device_get(jax.jit(jax.grad(loss))(kinds.on_mesh(cfg)))

  def distance(a, b):
    return [
      np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-12)
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]

  exact, masked = gradient(False, 'float32'), gradient(False, 'bfloat16')
  kernels = gradient(True, 'bfloat16')
  # keys at the cut of the top-k change places with any rounding
  for got, allowed in zip(distance(kernels, exact), distance(masked, exact), strict=True):
    assert got <= 1.25 * allowed + 5e-3
