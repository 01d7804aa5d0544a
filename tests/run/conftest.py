import pytest

from tests.run.program import SAMPLE, Program


@pytest.fixture(scope='session')
def program(tmp_path_factory):
  """Runs the program on the config of tiny.py."""
  return Program(tmp_path_factory.mktemp('program'))


@pytest.fixture(scope='session')
def straight(program, tmp_path_factory):
  """The workdir of a run of 12 steps without any interruption; tests only read it."""
  workdir = tmp_path_factory.mktemp('straight') / 'run'
  result = program.run(workdir, SAMPLE)
  assert result.code == 0, result
  return workdir


@pytest.fixture(scope='session')
def on_eight(program, tmp_path_factory):
  """The workdir of the first 8 of those steps, on 8 devices as mesh (2, 4, 1)."""
  workdir = tmp_path_factory.mktemp('on_eight') / 'run'
  result = program.run(workdir, '--config.steps=8', '--config.mesh.expert=4', devices=8)
  assert result.code == 0, result
  return workdir
