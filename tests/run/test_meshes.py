"""A run moves between meshes, and between processes, without losing a bit of its state."""

import shutil
import socket

import numpy as np
import pytest

from tests.run.program import bits, checkpoint_steps, lines, restore

pytestmark = pytest.mark.slow

# sums over devices come in another order, and twelve steps carry that on
RTOL = 1e-5


def assert_close(found, expected):
  assert [row['step'] for row in found] == [row['step'] for row in expected]
  for a, b in zip(found, expected, strict=True):
    for name in ('train/loss', 'train/grad_norm', 'eval/loss'):
      if name in b:
        np.testing.assert_allclose(a[name], b[name], rtol=RTOL, err_msg=f'{name}, {b["step"]}')


def test_eight_devices_learn_what_one_learns(straight, on_eight):
  assert_close(lines(on_eight)[:8], lines(straight)[:8])


def test_restore_on_another_mesh_is_bitwise_the_same(on_eight):
  saved = bits(restore(on_eight, step=8, mesh_shape=(2, 4, 1)))
  for mesh_shape in ((1, 1, 1), (8, 1, 1), (2, 2, 2)):
    assert bits(restore(on_eight, step=8, mesh_shape=mesh_shape)) == saved


def test_one_device_goes_on_where_eight_stopped(program, straight, on_eight, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(on_eight, workdir)
  result = program.run(workdir)
  assert result.code == 0, result.err
  assert 'resuming after step 8' in result.out
  assert_close(lines(workdir), lines(straight))
  # and what eight devices saved is still there
  assert bits(restore(workdir, step=8)) == bits(restore(on_eight, step=8))


def test_two_processes_train_together_and_one_goes_on(program, straight, on_eight, tmp_path):
  workdir = tmp_path / 'run'
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  arguments = ['--config.steps=8', '--config.mesh.expert=4']
  pair = [
    program.start(workdir, *arguments, f'--distributed={address},2,{i}', devices=4) for i in (0, 1)
  ]
  try:
    outputs = [process.communicate(timeout=300) for process in pair]
  finally:
    for process in pair:
      process.kill()
  assert [process.returncode for process in pair] == [0, 0], outputs
  assert '8 x cpu in 2 processes' in outputs[0][0]
  assert checkpoint_steps(workdir)[-1] == 8
  assert_close(lines(workdir), lines(on_eight))

  result = program.run(workdir)
  assert result.code == 0, result.err
  assert 'resuming after step 8' in result.out
  assert_close(lines(workdir), lines(straight))
