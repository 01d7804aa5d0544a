"""A damaged checkpoint is found, named, passed over, and made again."""

import shutil

import pytest

from tests.run.program import bits, lines, restore

pytestmark = pytest.mark.slow


def largest_file(folder):
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize('damage', [flip_a_bit, truncate])
def test_a_damaged_checkpoint_falls_back_and_finishes_equal(program, straight, tmp_path, damage):
  workdir = tmp_path / 'copy'
  shutil.copytree(straight, workdir)
  victim = largest_file(workdir / 'checkpoints' / 'step_00000012')
  damage(victim)
  result = program.run(workdir)
  assert result.code == 0, result
  assert victim.name in result.err
  assert 'is damaged and passed over' in result.err
  assert 'resuming after step 8' in result.out
  assert lines(workdir) == lines(straight)
  assert bits(restore(workdir)) == bits(restore(straight))


def test_when_all_are_damaged_it_is_one_line(program, straight, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(straight, workdir)
  for step in (workdir / 'checkpoints').iterdir():
    flip_a_bit(largest_file(step))
  result = program.run(workdir)
  assert result.code == 2
  *warnings, line = result.err.splitlines()
  assert line.startswith('error: no good checkpoint in')
  assert len(warnings) == len(list((workdir / 'checkpoints').iterdir()))
