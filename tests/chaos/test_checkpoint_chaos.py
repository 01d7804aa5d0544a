"""Kills and full disks: a step that was confirmed is never lost, and no half step is ever seen.

The file is also the program that is killed.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.train.checkpoint import Checkpointer, CheckpointError

pytestmark = pytest.mark.chaos


def create(step):
  key = jax.random.fold_in(jax.random.key(0), step)
  return {'w': jax.random.normal(key, (500, 1000)), 'key': key, 'step': jnp.int32(step)}


TARGET = jax.eval_shape(create, 0)


def check_restores(folder: Path, *, at_least: int) -> int:
  """Restores with an eye on every bit; returns the step."""
  with Checkpointer(folder, keep=2) as checkpointer:
    restored = checkpointer.restore(TARGET)
    if restored is None:
      assert at_least == 0
      return 0
    expected = create(restored.step)
    assert restored.step == restored.meta['position'] >= at_least
    assert int(restored.state['step']) == restored.step
    assert np.asarray(restored.state['w']).tobytes() == np.asarray(expected['w']).tobytes()
    assert (restored.state['key'] == expected['key']).all()
    return restored.step


def program(folder: Path) -> None:
  """Goes on from the newest step and saves without a pause, saying which steps are on the disk."""
  step = check_restores(folder, at_least=0)
  with Checkpointer(folder, keep=2) as checkpointer:
    while True:
      step += 1
      checkpointer.save(step, create(step), meta={'position': step})
      print(step - 1, flush=True)  # save has waited for the one before


def test_kill_at_random_instants_loses_no_confirmed_step(tmp_path):
  instants, confirmed, killed_in_a_save = random.Random(0), 0, 0
  env = os.environ | {'PYTHONPATH': str(Path(__file__).parents[2])}
  for _ in range(10):
    with subprocess.Popen(
      [sys.executable, __file__, tmp_path], env=env, stdout=subprocess.PIPE, text=True
    ) as victim:
      try:
        first = victim.stdout.readline()
        assert first, 'the program ended by itself'
        time.sleep(instants.uniform(0, 0.5))
      finally:
        victim.kill()
      confirmed = int([first, *victim.stdout.read().splitlines()][-1])
    killed_in_a_save += any(tmp_path.glob('*.partial'))
    # at most one save was under way
    assert check_restores(tmp_path, at_least=confirmed) <= confirmed + 1
  assert confirmed > 10
  assert killed_in_a_save >= 5, 'the kills miss the saves, so this test shows nothing'


@contextlib.contextmanager
def mounted(folder: Path, options: str):
  folder.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
  with contextlib.suppress(FileNotFoundError):
    if subprocess.run(command, capture_output=True).returncode == 0:
      try:
        yield
      finally:
        subprocess.run(['umount', str(folder)], check=True)
      return
  pytest.skip('only root can mount a small disk')


def test_full_disk_is_one_line_and_the_good_step_stays(tmp_path):
  disk = tmp_path / 'disk'
  with mounted(disk, 'size=3m'), Checkpointer(disk / 'checkpoints', keep=2) as checkpointer:
    checkpointer.save(1, create(1), meta={'position': 1})
    checkpointer.save(2, create(2), meta={'position': 2})
    for wait_or_save in (checkpointer.wait, lambda: checkpointer.save(3, create(3))):
      with pytest.raises(CheckpointError, match=r'No space left on device \(\d MB left there\)'):
        wait_or_save()
        checkpointer.wait()
    assert [p.name for p in (disk / 'checkpoints').iterdir()] == ['step_00000001']
    assert check_restores(disk / 'checkpoints', at_least=1) == 1
    # room again: the same checkpointer goes on
    subprocess.run(['mount', '-o', 'remount,size=9m', str(disk)], check=True)
    checkpointer.save(4, create(4), meta={'position': 4})
    checkpointer.wait()
    assert check_restores(disk / 'checkpoints', at_least=4) == 4


def test_disk_turned_read_only_is_one_line_and_the_good_step_restores(tmp_path):
  disk = tmp_path / 'disk'
  with mounted(disk, 'size=9m'), Checkpointer(disk / 'checkpoints', keep=2) as checkpointer:
    checkpointer.save(1, create(1), meta={'position': 1})
    checkpointer.wait()
    subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
    with pytest.raises(CheckpointError, match=r'cannot save step 2 .*Read-only file system'):
      checkpointer.save(2, create(2))
    assert check_restores(disk / 'checkpoints', at_least=1) == 1


if __name__ == '__main__':
  program(Path(sys.argv[1]))
