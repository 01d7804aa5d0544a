"""Whole models by the kernels of MoBA, NSA and V4's attention against masks over all pairs."""

import dataclasses
import functools
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
# rows of one document pair each; leaves of fewer numbers are judged as single draws
BATCHES, FEW = 8, 64


def gradients(cfg, precision: str, length: int, *, batches: int = 1):
  """Of all variables, for each of some batches of two documents and padding."""
  cut = length * 5 // 8
  place = np.arange(length)
  segment = np.where(place < cut, 1, np.where(place < length - 7, 2, 0))[None]
  position = np.where(segment == 1, place, np.where(segment == 2, place - cut, 0))
  ids_N1S = np.random.default_rng(0).integers(0, 40, (batches, 1, length))
  matmuls = jax.default_matmul_precision('highest' if precision == 'float32' else 'default')
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), matmuls:
    _, variables = tiny_v4.make(cfg, rows=1)

    def loss(params, rest, where):
      out: Any = Decoder(cfg, policy(precision)).apply({'params': params, **rest}, where)
      wide = out.hidden_BSD.astype(np.float32) * (segment > 0)[..., None]
      return (wide**4).mean() + sum(out.aux[k].sum() for k in out.aux if k == 'indexer_loss')

    rest = {k: v for k, v in variables.items() if k != 'params'}
    of_batch = jax.jit(jax.grad(loss))
    batches_N = [kinds.where_of(ids, segment, position) for ids in ids_N1S]
    return [jax.device_get(of_batch(variables['params'], rest, where)) for where in batches_N]


def by_masks(monkeypatch):
  for module in (compressed, nsa.nsa, moba.moba):
    monkeypatch.setattr(module, 'unsupported', lambda *_: 'is told not to')


def distance(some, exact):
  """Of every leaf, by its name: relative Frobenius over all batches together."""
  stack = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
  some, exact = flat(stack(some)), flat(stack(exact))
  return {
    name: np.linalg.norm(some[name] - y) / max(np.linalg.norm(y), 1e-12)
    for name, y in exact.items()
  }


def flat(tree) -> dict[str, np.ndarray]:
  return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU')
@pytest.mark.parametrize('name', MODELS)
def test_kernels_train_as_masks_do(name, monkeypatch):
  several = functools.partial(gradients, MODELS[name], length=544, batches=BATCHES)
  kernels = several('bfloat16')
  by_masks(monkeypatch)
  masked, exact = several('bfloat16'), several('float32')
  # entries and blocks at the cut of a choice change places with any rounding
  got, allowed = distance(kernels, exact), distance(masked, exact)
  sizes = {k: x.size for k, x in flat(exact[0]).items()}
  # rounding of a scalar is one draw a batch: two sets of 8 draws differ by half of their spread
  slack = lambda size: 1.25 if size > FEW else 2.0
  worse = {k: (got[k], allowed[k]) for k in got if got[k] > slack(sizes[k]) * allowed[k] + 5e-3}
  assert not worse


@pytest.mark.slow
def test_moba_by_kernels_is_moba_by_masks(monkeypatch):
  small = dataclasses.replace(MOBA, num_heads=4, d_head=16, d_value=16, block_size=8)
  cfg = kinds.tiny('moba', moba=small, num_layers=1, num_dense_layers=1)
  exact = gradients(cfg, 'float32', 50)
  monkeypatch.setattr(moba.moba, 'unsupported', lambda *_: None)
  assert max(distance(gradients(cfg, 'float32', 50), exact).values()) < 1e-5
