"""Whole models by the kernels of MoBA, NSA and V4's attention against masks over all pairs."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.config import CompressedConfig, MoBAConfig, NSAConfig
from moe_jax.models.attention import compressed, moba, nsa
from moe_jax.models.decoder import Decoder
from moe_jax.precision import policy
from tests.models import kinds, tiny_v4

V4 = CompressedConfig(
  num_heads=64, d_head=512, d_rope=64, q_rank=64, window=128, num_groups=4, group_rank=64,
  csa_ratio=4, hca_ratio=64, num_index_heads=64, d_index=128, index_top_k=64, rope=tiny_v4.ROPE,
)  # fmt: skip
NSA = NSAConfig(
  num_heads=32, num_kv_heads=2, d_head=64, d_value=64, compress_length=32, compress_stride=16,
  d_compress=64, select_length=64, top_blocks=4, window=128,
)  # fmt: skip
MOBA = MoBAConfig(num_heads=8, num_kv_heads=2, d_head=64, d_value=64, block_size=64, top_k=2)
ONE = {'d_model': 256, 'num_layers': 1, 'num_dense_layers': 1}
MODELS = {
  'v4': dataclasses.replace(
    tiny_v4.CONFIG, d_model=256, num_layers=3, attention_per_layer=('sliding', 'csa', 'hca'),
    compressed=V4, moe=dataclasses.replace(tiny_v4.CONFIG.moe, d_expert=64),
  ),
  'nsa': kinds.tiny('nsa', nsa=NSA, **ONE),
  'moba': kinds.tiny('moba', moba=MOBA, **ONE),
}  # fmt: skip


def gradient(cfg, precision: str, length: int):
  """Of all variables, over two documents and padding."""
  cut = length * 5 // 8
  place = np.arange(length)
  segment = np.where(place < cut, 1, np.where(place < length - 7, 2, 0))[None]
  position = np.where(segment == 1, place, np.where(segment == 2, place - cut, 0))
  ids = np.random.default_rng(0).integers(0, 40, (1, length))
  matmuls = jax.default_matmul_precision('highest' if precision == 'float32' else 'default')
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), matmuls:
    where = kinds.where_of(ids, segment, position)
    _, variables = tiny_v4.make(cfg, rows=1)

    def loss(params, rest):
      out: Any = Decoder(cfg, policy(precision)).apply({'params': params, **rest}, where)
      wide = out.hidden_BSD.astype(np.float32) * (segment > 0)[..., None]
      return (wide**4).mean() + sum(out.aux[k].sum() for k in out.aux if k == 'indexer_loss')

    rest = {k: v for k, v in variables.items() if k != 'params'}
    return jax.device_get(jax.jit(jax.grad(loss))(variables['params'], rest))


def by_masks(monkeypatch):
  for module in (compressed, nsa.nsa, moba.moba):
    monkeypatch.setattr(module, 'unsupported', lambda *_: 'is told not to')


def distance(a, b):
  """Of every leaf, by its name: relative Frobenius."""
  pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
  return {
    jax.tree_util.keystr(path): np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-12)
    for (path, x), y in pairs
  }


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU')
@pytest.mark.parametrize('name', MODELS)
def test_kernels_train_as_masks_do(name, monkeypatch):
  kernels = gradient(MODELS[name], 'bfloat16', 544)
  by_masks(monkeypatch)
  masked, exact = (gradient(MODELS[name], p, 544) for p in ('bfloat16', 'float32'))
  # entries and blocks at the cut of a choice change places with any rounding
  got, allowed = distance(kernels, exact), distance(masked, exact)
  worse = {
    name: (got[name], allowed[name]) for name in got if got[name] > 1.25 * allowed[name] + 5e-3
  }
  assert not worse


@pytest.mark.slow
def test_moba_by_kernels_is_moba_by_masks(monkeypatch):
  small = dataclasses.replace(MOBA, num_heads=4, d_head=16, d_value=16, block_size=8)
  cfg = kinds.tiny('moba', moba=small, num_layers=1, num_dense_layers=1)
  exact = gradient(cfg, 'float32', 50)
  monkeypatch.setattr(moba.moba, 'unsupported', lambda *_: None)
  assert max(distance(gradient(cfg, 'float32', 50), exact).values()) < 1e-5
