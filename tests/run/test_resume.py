"""A run that was stopped and goes on is the run that never stopped, bit for bit."""

import json
import shutil
import signal

import pytest

from moe_jax.train.metrics import read_metrics
from tests.run.program import SAMPLE, bits, checkpoint_steps, last_step, lines, restore, wait_for

pytestmark = pytest.mark.slow


def test_two_runs_are_bit_identical(program, straight, tmp_path):
  again = tmp_path / 'again'
  assert program.run(again, SAMPLE, reuse=False).code == 0
  assert lines(again) == lines(straight)
  assert bits(restore(again)) == bits(restore(straight))
  texts = [json.loads((w / 'summary.json').read_text())['sample'] for w in (again, straight)]
  assert texts[0] == texts[1]
  assert texts[0]['text']


def test_more_steps_continue_and_equal_straight_through(program, straight, tmp_path):
  workdir = tmp_path / 'run'
  assert program.run(workdir, '--config.steps=8').code == 0
  assert checkpoint_steps(workdir)[-1] == 8
  result = program.run(workdir)
  assert result.code == 0
  assert 'resuming after step 8' in result.out
  assert [e['event'] for e in read_metrics(workdir).events] == ['resume']
  assert lines(workdir) == lines(straight)
  assert bits(restore(workdir)) == bits(restore(straight))


def test_a_finished_run_says_that_nothing_is_left(program, straight, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(straight, workdir)
  before = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file() and p.name != '.lock'}
  result = program.run(workdir, SAMPLE)
  assert result.code == 0
  assert 'Nothing left to do' in result.out
  assert '--config.steps=N' in result.out
  assert {p: p.read_bytes() for p in before} == before


def test_sigterm_saves_and_exits_zero_and_the_same_command_resumes(program, straight, tmp_path):
  workdir = tmp_path / 'run'
  endless = '--config.steps=100000'
  with program.start(workdir, endless) as process:
    try:
      wait_for(lambda: last_step(workdir) >= 13, process)
      process.send_signal(signal.SIGTERM)
      out, err = process.communicate(timeout=60)
    finally:
      process.kill()
  assert process.returncode == 0, err
  stopped = last_step(workdir)
  assert f'stopped after step {stopped} as asked' in out
  assert checkpoint_steps(workdir)[-1] == stopped
  # up to here it is the same run, but for what the last step of the shorter one writes
  assert lines(workdir)[: len(lines(straight))] == lines(straight)

  result = program.run(workdir, f'--config.steps={stopped + 3}')
  assert result.code == 0, result.err
  assert f'resuming after step {stopped}' in result.out
  assert last_step(workdir) == stopped + 3
