"""DSA by gathering equals DSA by masks: values, gradients, losses, and decoding over a cache."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.models.attention import dsa, gathered
from moe_jax.models.decoder import Decoder
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
