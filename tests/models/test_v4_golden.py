"""DeepSeek-V4 computes what the published code computes."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import interop
from moe_jax.interop.safetensors import read_folder
from moe_jax.interop.variables import one_device
from moe_jax.models.decoder import Decoder, head_DV
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
