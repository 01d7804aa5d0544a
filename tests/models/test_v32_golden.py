"""DeepSeek-V3.2 computes what the published code computes."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from v32_checkpoint import GOLDEN, load, run_layers, run_logits, where_of

from moe_jax import sharding as sh

# more checkpoints of the same kind: a folder of folders, as tests/golden
MORE = os.environ.get('MOE_JAX_V32_GOLDENS')
CASES = [GOLDEN / 'v32', *(sorted(Path(MORE).iterdir()) if MORE else [])]
# float32 products summed in another order, over 3 layers, logits of order 2
TOLERANCE = 1e-5


@pytest.mark.parametrize('folder', CASES, ids=lambda f: f.name)
def test_v32_logits_and_streams_equal_the_published_ones(folder):
  io = np.load(folder / 'io.npz')
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), jax.default_matmul_precision('highest'):
    m, variables = load(folder)
    where = where_of(io['ids'])
    logits_BSV = jax.jit(lambda v, w: run_logits(m, v, w))(variables, where)
    streams = jax.jit(lambda v, w: run_layers(m, v, w))(variables, where)
  errors = {'logits': np.abs(logits_BSV - io['logits']).max()}
  for i, x_BSD in enumerate(streams):
    errors[f'hidden_{i}'] = np.abs(x_BSD - io[f'hidden_{i}']).max()
  print(errors)
  assert max(errors.values()) <= TOLERANCE, errors
