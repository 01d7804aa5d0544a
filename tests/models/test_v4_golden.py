"""DeepSeek-V4 computes what the published code computes."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import interop
from moe_jax import sharding as sh
from moe_jax.interop import v4
from moe_jax.interop.checkpoint import Checkpoint
from moe_jax.interop.safetensors import read_folder
from moe_jax.interop.table import Scope, links, to_leaf
from moe_jax.interop.variables import flat, one_device
from moe_jax.models.decoder import Decoder, head_DV
from moe_jax.models.mtp_streams import KIND, StreamMTP
from moe_jax.precision import policy
from tests.models import tiny_v4

GOLDEN = Path(__file__).parents[1] / 'golden' / 'v4'
# more checkpoints of the same kind: a folder of folders, as tests/golden
MORE = os.environ.get('MOE_JAX_V4_GOLDENS')
CASES = [GOLDEN, *(sorted(Path(MORE).iterdir()) if MORE else [])]
# float32 products summed in another order, over 5 layers, logits of order one
TOLERANCE = 1e-5


@pytest.mark.parametrize('folder', CASES, ids=lambda f: f.name)
def test_logits_and_streams_equal_the_published_ones(folder):
  io = np.load(folder / 'io.npz')
  with jax.set_mesh(one_device()), jax.default_matmul_precision('highest'):
    cfg, variables = interop.load(folder)
    model = Decoder(cfg, policy('float32'))

    @jax.jit
    def run(variables, where):
      out = model.apply(variables, where, intermediates=True)
      head = head_DV(variables['params'], model.policy)
      return jnp.einsum('bsd,dv->bsv', out.hidden_BSD, head), out.aux['entering']

    logits_BSV, entering = run(variables, tiny_v4.whole(io['ids']))
  errors = {'logits': np.abs(logits_BSV - io['logits']).max()}
  for i, x_BSJD in enumerate(entering):
    errors[f'hidden_{i}'] = np.abs(x_BSJD - io[f'hidden_{i}']).max()
  print(errors)
  assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize('packed', (False, True), ids=('published', 'packed'))
def test_a_checkpoint_survives_a_round_trip_bit_for_bit(packed, tmp_path):
  cfg, variables = interop.load(GOLDEN)
  interop.save(cfg, variables, tmp_path / 'out', packed=packed)
  again_cfg, again = interop.load(tmp_path / 'out')
  assert again_cfg == cfg
  same = jax.tree.map(lambda a, b: np.array_equal(a, b), variables, again)
  assert jax.tree.all(same)
  names = set(read_folder(tmp_path / 'out'))
  wanted = 'model.layers.2.self_attn.compressor.indexer.kv_proj.weight'
  assert (wanted if packed else 'layers.2.attn.indexer.compressor.wkv.weight') in names


def test_prediction_of_the_token_after_next_equals_the_published_one():
  io = np.load(GOLDEN.parent / 'v4_mtp.npz')
  ids, streams = io['ids'], io['hstream']
  cfg = Checkpoint(GOLDEN).cfg
  module = StreamMTP(cfg, (), policy('float32'))
  with jax.set_mesh(one_device()), jax.default_matmul_precision('highest'):
    where = tiny_v4.whole(ids[:, 1:])
    embedded_BSD = jax.device_put(io['w.embed.weight'][ids[:, 1:]], sh.STREAM)
    x_BSJD = jax.device_put(streams[:, :-1], sh.STREAMS)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_BSJD, embedded_BSD, where, None)
    sizes = {name: leaf.shape for name, leaf in flat(shapes).items()}
    leaves = {name: np.full(shape, np.nan, np.float32) for name, shape in sizes.items()}
    scopes = [
      Scope('', (), 'w.mtp.0.', v4.MTP),
      Scope('block.', (), 'w.mtp.0.', v4.layer_rules(cfg, KIND, 'published')),
    ]
    for link in links(scopes, sizes):
      piece = to_leaf(link, sizes, io[link.tensor])
      leaves[link.leaf][(*link.leaf_at, *link.leaf_part)] = piece
    variables = jax.tree.unflatten(jax.tree.structure(shapes), leaves.values())
    put = lambda a, like: jax.device_put(a, like.sharding.spec)
    variables = jax.tree.map(put, variables, shapes)
    out = jax.jit(module.apply)(variables, x_BSJD, embedded_BSD, where, None)
  logits_BSV = np.asarray(out.hidden_BSD) @ io['w.head.weight'].T
  error = np.abs(logits_BSV - io['mtp_logits']).max()
  print(error)
  assert error <= TOLERANCE
