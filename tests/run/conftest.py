import pytest

from tests.run.program import Program


@pytest.fixture(scope='session')
def program(tmp_path_factory):
  """Runs the program on the config of tiny.py."""
  return Program(tmp_path_factory.mktemp('program'))


@pytest.fixture(scope='session')
def straight(program, tmp_path_factory):
  """The workdir of a run of 12 steps without any interruption; tests only read it."""
  workdir = tmp_path_factory.mktemp('straight') / 'run'
  result = program.run(workdir)
  assert result.code == 0, result
  return workdir
