"""What a loaded checkpoint computes is what the published code computes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpy_deepseek
import pytest
from checkpoints import GOLDEN, V1, V2, V3, V32, YARN, make, random_tensors

from moe_jax import interop
from moe_jax import sharding as sh
from moe_jax.interop.safetensors import read_folder
from moe_jax.interop.table import layers
from moe_jax.interop.variables import one_device
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Block
from moe_jax.precision import policy
from moe_jax.routing import Balance

# the bar of the project: float32 against the published float32, logits and streams of order 1
TOLERANCE = 1e-5
CASES = ('moe16b', 'v2_lite', 'v2', 'v3', 'v32')


def streams(folder, ids):
  """The residual stream entering each layer, by applying our layers one after the other."""
  with jax.set_mesh(one_device()), jax.default_matmul_precision('highest'):
    cfg, variables = interop.load(folder)
    token_BS = jnp.asarray(ids, jnp.int32)
    position_BS = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    where = Where(token_BS, position_BS, jnp.ones_like(token_BS), jnp.zeros(len(ids), jnp.int32))
    table_VD = np.asarray(variables['params']['embedding_VD'])
    x_BSD, seen = jax.device_put(table_VD[ids], sh.STREAM), []

    @functools.partial(jax.jit, static_argnums=0)
    def apply(kind, one, x_BSD):
      return Block(kind, cfg, Balance(), policy('float32')).apply(one, x_BSD, where, None)[0]

    for number, path, repeat in layers(cfg):
      seen.append(np.asarray(x_BSD))
      group, layer = path.strip('.').split('.')
      one = {
        name: jax.tree.map(lambda a: a[repeat], tree[group][layer])  # noqa: B023
        for name, tree in variables.items()
        if layer in tree.get(group, {})
      }
      x_BSD = apply(cfg.layers[number], one, x_BSD)
    return seen


@pytest.mark.parametrize('case', CASES)
def test_logits_equal_the_goldens(case):
  io = np.load(GOLDEN / case / 'io.npz')
  logits_BSV = interop.logits(GOLDEN / case, io['ids'])
  assert logits_BSV.dtype == np.float32 and logits_BSV.shape == io['logits'].shape
  assert np.abs(logits_BSV - io['logits']).max() < TOLERANCE


@pytest.mark.parametrize('case', CASES)
def test_stream_entering_every_layer_equals_the_goldens(case):
  io = np.load(GOLDEN / case / 'io.npz')
  for i, seen in enumerate(streams(GOLDEN / case, io['ids'])):
    assert np.abs(seen - io[f'hidden_{i}']).max() < TOLERANCE, f'layer {i}'


@pytest.mark.parametrize('case', CASES)
def test_oracle_of_these_tests_equals_the_goldens(case):
  io = np.load(GOLDEN / case / 'io.npz')
  config = json.loads((GOLDEN / case / 'config.json').read_text())
  tensors = {n: t.read() for n, t in read_folder(GOLDEN / case).items()}
  logits, entering = numpy_deepseek.forward(config, tensors, io['ids'])
  assert np.abs(logits - io['logits']).max() < TOLERANCE
  assert all(np.abs(h - io[f'hidden_{i}']).max() < TOLERANCE for i, h in enumerate(entering))


OTHERS = {
  'V1 with normalised weights': (V1 | dict(norm_topk_prob=True), 9),
  'V1 with one layer, one head and one token': (
    V1 | dict(num_hidden_layers=1, first_k_dense_replace=0, num_attention_heads=1,
              num_key_value_heads=1), 1),
  'V2 without query latent, all layers with experts': (
    V2 | dict(q_lora_rank=None, first_k_dense_replace=0, num_hidden_layers=3), 17),
  'V2 with groups': (
    V2 | dict(topk_method='group_limited_greedy', n_group=3, topk_group=2, num_experts_per_tok=3,
              routed_scaling_factor=16.0), 20),
  'V2 with YaRN of 0.707': (
    V2 | dict(rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707)), 33),
  'V2 greedy that names groups anyway': (V2 | dict(n_group=3, topk_group=1), 8),
  'V3 with two dense layers of five, wide values': (
    V3 | dict(num_hidden_layers=5, first_k_dense_replace=2, v_head_dim=18, kv_lora_rank=5), 12),
  'V3 with no experts at all': (V3 | dict(first_k_dense_replace=2), 7),
  'V3 without groups, weights as they are': (
    V3 | dict(n_group=1, topk_group=1, norm_topk_prob=False, num_experts_per_tok=5), 11),
  'V3 with many experts in four groups': (
    V3 | dict(n_routed_experts=24, n_group=4, topk_group=3, num_experts_per_tok=7), 15),
  'V3 without query latent': (V3 | dict(q_lora_rank=None), 6),
  'V3 with a coarse norm': (V3 | dict(rms_norm_eps=1e-2), 10),
  'V3 with YaRN that scales cos and sin': (V3 | dict(rope_scaling=dict(YARN, factor=8)), 40),
  'V3 with unequal mscales and another base': (
    V3 | dict(rope_theta=500.0, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=0.5)), 40),
  'V3 with rope_parameters': (
    V3 | dict(rope_theta=None, rope_parameters=dict(
      rope_type='yarn', rope_theta=5000.0, factor=4, original_max_position_embeddings=32,
      mscale=1.0, mscale_all_dim=1.0)), 30),
  'V3.2 with more keys than its indexer picks': (V32, 21),
  'V3.2 with fewer keys than its indexer picks': (V32 | dict(index_topk=30), 21),
  'V3.2 of one token': (V32, 1),
  'V3.2 with YaRN, wide index heads and a coarse norm': (
    V32 | dict(index_head_dim=22, index_n_heads=12, index_topk=11, rms_norm_eps=1e-2,
               num_hidden_layers=4, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0)), 70),
  'V3.2 with YaRN that scales cos and sin': (V32 | dict(rope_scaling=dict(YARN, factor=8)), 40),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', OTHERS)
def test_logits_and_streams_of_other_sizes_equal_the_oracle(name, tmp_path):
  config, length = OTHERS[name]
  seed = len(name)
  folder = make(tmp_path / 'a', config, seed)
  ids = np.random.default_rng(seed).integers(0, config['vocab_size'], (2, length))
  logits, entering = numpy_deepseek.forward(config, random_tensors(config, seed), ids)
  assert np.abs(interop.logits(folder, ids) - logits).max() < TOLERANCE
  for mine, theirs in zip(streams(folder, ids), entering, strict=True):
    assert np.abs(mine - theirs).max() < TOLERANCE
