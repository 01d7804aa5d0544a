"""Two processes share checkpoints, refusals and the step they stop at.

The file is also the program that each of the two runs.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

from moe_jax.train import digests
from moe_jax.train.checkpoint import Checkpointer, CheckpointError
from moe_jax.train.signals import StopSignal
from moe_jax.train.workdir import Workdir, WorkdirError


def make_mesh(shape):
  axes = ('data', 'expert', 'model')
  return jax.make_mesh(shape, axes, axis_types=(AxisType.Explicit,) * 3)


def create(key):
  w_EDF = jax.random.normal(key, (8, 16, 8), out_sharding=P('expert', 'data', 'model'))
  return {'w_EDF': w_EDF, 'step': jnp.int32(3), 'key': key}


def local_bits(tree):
  raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return [
    (str(s.index), np.asarray(s.data).tobytes())
    for x in jax.tree.leaves(tree)
    for s in raw(x).addressable_shards
  ]


def say(*words):
  print(*words, flush=True)


def program(index: int, port: str, folder: Path) -> None:
  jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=index)
  jax.set_mesh(make_mesh((2, 2, 2)))
  key = jax.random.key(0)
  state, target = jax.jit(create)(key), jax.eval_shape(create, key)

  config = {'steps': 1, 'width': 8}
  Workdir.open(folder, config, may_change=()).close()
  try:
    Workdir.open(folder, config | {'width': 9}, may_change=())
  except WorkdirError as e:
    say('refused:', 'width: 8 -> 9' in str(e))

  with Checkpointer(folder / 'checkpoints', keep=2) as checkpointer:
    say('nothing:', checkpointer.restore(target))
    for step in (10, 20, 30):
      checkpointer.save(step, state, meta={'position': step})
    checkpointer.wait()
    say('steps:', checkpointer.steps())
    restored = checkpointer.restore(target)
    say('same:', restored.step, local_bits(restored.state) == local_bits(state))

    seal = digests.seal
    if index == 0:
      digests.seal = lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device'))
    checkpointer.save(40, state)
    try:
      checkpointer.wait()
    except CheckpointError as e:
      say('failed:', 'step 40' in str(e) and 'No space' in str(e))
    digests.seal = seal
    say('steps:', checkpointer.steps())

  with StopSignal() as stop:
    for step in range(1000):
      if step == 5 and index == 1:
        os.kill(os.getpid(), signal.SIGINT)
      if stop.stop_requested(step):
        break
      time.sleep(0.02 * (1 + index))  # the two drift apart; agreeing is the service's task
    say('stopped:', step)


@pytest.mark.slow
def test_two_processes_agree_and_one_restores_what_they_saved(tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = str(free.getsockname()[1])
  flag = '--xla_force_host_platform_device_count=4'
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flag}
  env['PYTHONPATH'] = str(Path(__file__).parents[2])
  commands = [[sys.executable, '-W', 'error', __file__, str(i), port, tmp_path] for i in (0, 1)]
  pair = [
    subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for c in commands
  ]
  try:
    outputs = [process.communicate(timeout=120) for process in pair]
  finally:
    for process in pair:
      process.kill()
  assert [process.returncode for process in pair] == [0, 0], outputs

  lines = [[line for line in out.splitlines() if 'Gloo' not in line] for out, _ in outputs]
  assert lines[0] == lines[1]
  *before, stopped = lines[0]
  assert before == [
    'refused: True',
    'nothing: None',
    'steps: [20, 30]',
    'same: 30 True',
    'failed: True',
    'steps: [20, 30]',
  ]
  assert 5 < int(stopped.removeprefix('stopped: ')) < 999

  # bitwise the same as drawing it here: this process has all 8 devices, on another mesh
  with jax.set_mesh(make_mesh((8, 1, 1))), Checkpointer(tmp_path / 'checkpoints', keep=2) as one:
    key = jax.random.key(0)
    restored = one.restore(jax.eval_shape(create, key))
    assert (restored.step, restored.meta) == (30, {'position': 30})
    assert local_bits(restored.state) == local_bits(jax.jit(create)(key))


if __name__ == '__main__':
  program(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
