"""Twenty steps give the losses they always gave, to the last bit.

A refactor must not change them. A change of numerics writes them anew, in a commit of its own that
gives the reason:

  JAX_PLATFORMS=cpu python -m tests.models.test_golden_losses
"""

import functools
import hashlib
import itertools
import json
import pathlib
import platform
import sys

import jax
import numpy as np
import pytest

from experiments.flags import load
from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.data.pipeline import RowSource, batches
from moe_jax.train.state import create
from moe_jax.train.step import jit_train_step

FILE = pathlib.Path(__file__).parents[1] / 'golden' / 'losses.json'
TINY = pathlib.Path(__file__).parents[1] / 'run' / 'tiny.py'
STEPS = 20
CONFIGS = {
  'v3': {},
  'v1': {
    'balance': 'expert_level+z_loss',
    'microbatches': 2,
    'model.attention': 'full',
    'model.full.num_heads': 2,
    'model.full.d_head': 8,
    'model.moe.score': 'softmax',
    'model.moe.num_groups': 1,
    'model.moe.top_groups': 1,
    'model.moe.num_shared': 2,
    'model.moe.normalize_weights': False,
  },
}


def losses(name: str, cache_dir: str) -> list[float]:
  c = load(str(TINY))
  c.update_from_flattened_dict({'data.cache_dir': cache_dir, **CONFIGS[name]})
  cfg = config_io.build(c.to_dict())
  mesh = sh.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    state = jax.jit(functools.partial(create, cfg))(jax.random.key(cfg.seed))
    step = jit_train_step(cfg)
    source = RowSource(cfg.data, seed=cfg.seed, split='train')
    stream = batches(
      source, batch_size=cfg.data.batch_size, sharding=sh.batch_sharding(mesh), start=0
    )
    found = []
    for _, batch in itertools.islice(stream, STEPS):
      state, metrics = step(state, batch)
      found.append(float(metrics['train/loss']))
    stream.close()
  return found


def here() -> dict[str, str]:
  """What the last bits depend on: the compiler, and the instructions that it may use."""
  cpu = pathlib.Path('/proc/cpuinfo')
  text = cpu.read_text() if cpu.is_file() else platform.processor()
  kinds = {line for line in text.splitlines() if line.startswith(('model name', 'flags'))}
  digest = hashlib.sha256('\n'.join(sorted(kinds)).encode()).hexdigest()
  return {'jaxlib': jax.lib.__version__, 'machine': platform.machine(), 'cpu': digest[:16]}


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_losses_of_twenty_steps_are_the_golden_ones(name, tmp_path):
  golden = json.loads(FILE.read_text())
  found, expected = losses(name, str(tmp_path)), golden[name]
  if golden['made_on'] == here():
    assert found == expected
  # elsewhere the compiler joins other operations, and twenty steps carry that on
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_golden_losses_fall():
  golden = json.loads(FILE.read_text())
  for name in CONFIGS:
    assert golden[name][-1] < golden[name][0] - 0.3


def write(cache_dir: str) -> None:
  golden = {'made_on': here()} | {name: losses(name, cache_dir) for name in CONFIGS}
  FILE.write_text(json.dumps(golden, indent=1) + '\n')


if __name__ == '__main__':
  write(*sys.argv[1:] or [''])
