"""A sweep runs its rows, keeps what failed, resumes what was cut off, and leaves tidy tables."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from moe_jax.train.metrics import read_metrics
from tests.run.program import CONFIG, DEPRECATED, ROOT
from tests.sweeps.conftest import FAKE

pd = pytest.importorskip('pandas')
pytestmark = pytest.mark.filterwarnings(DEPRECATED)

FOUR = "def sweep():\n  return space.grid({'seed': [0, 1], 'optim.lr_peak': [1e-3, 2e-3]})\n"
FAILING = "def sweep():\n  return space.grid({'optim.lr_peak': [9.0, 8.0, 1e-3]})\n"


def records(folder):
  return [json.loads(path.read_text()) for path in sorted(folder.glob('rows/*/row.json'))]


def test_rows_run_and_the_tables_hold_overrides_and_metrics(sweep, tmp_path):
  code, out, _ = sweep(FOUR, '--jobs=2')
  assert code == 0
  assert '4 done' in out
  results = pd.read_parquet(tmp_path / 'sweep' / 'results.parquet')
  assert list(results['state']) == ['done'] * 4
  assert list(results['seed']) == [0, 0, 1, 1]
  assert list(results['optim.lr_peak']) == [1e-3, 2e-3, 1e-3, 2e-3]
  assert list(results['eval/loss']) == pytest.approx([1.1, 1.2, 1.1, 1.2])
  assert list(results['router/max_vio.max']) == pytest.approx([0.2] * 4)
  steps = pd.read_parquet(tmp_path / 'sweep' / 'steps.parquet')
  vio = steps[(steps['metric'] == 'router/max_vio') & (steps['row'] == 1)]
  assert len(vio) == 20
  assert sorted(set(vio['layer'])) == [1, 2], 'the first layer is dense'
  for name in ('results', 'steps'):
    csv = pd.read_csv(tmp_path / 'sweep' / f'{name}.csv')
    assert len(csv) == len(pd.read_parquet(tmp_path / 'sweep' / f'{name}.parquet'))


def test_a_failed_row_keeps_its_reason_and_the_others_go_on(sweep, tmp_path):
  code, out, _ = sweep(FAILING)
  assert code == 1
  assert '1 done, 2 failed' in out
  results = pd.read_csv(tmp_path / 'sweep' / 'results.csv')
  assert list(results['state']) == ['failed', 'failed', 'done']
  assert results['error'][0] == 'lr_peak=9 is too much. Lower it.'
  assert results['error'][1].endswith('RuntimeError: a bug')


def test_the_same_command_leaves_finished_and_failed_rows_alone(sweep, tmp_path):
  sweep(FAILING)
  code, out, _ = sweep(FAILING)
  assert code == 1
  assert 'row 3/3 was done' in out
  assert sorted(r['starts'] for r in records(tmp_path / 'sweep')) == [1, 1, 1]
  sweep(FAILING, '--retry')
  assert sorted(r['starts'] for r in records(tmp_path / 'sweep')) == [1, 2, 2]


def test_dry_run_prints_the_commands_and_writes_nothing(sweep, tmp_path):
  code, out, _ = sweep(FOUR, '--dry_run', '--config.steps=7')
  assert code == 0
  assert out.count('--config.steps=7 --config.seed=') == 4
  assert not (tmp_path / 'sweep').exists()


def test_fields_of_mixed_types_become_words(sweep, tmp_path):
  text = "def sweep():\n  yield {'mesh.data': -1}\n  yield {'optim.step_fractions': (0.5, 0.75)}\n"
  assert sweep(text)[0] == 0
  results = pd.read_parquet(tmp_path / 'sweep' / 'results.parquet')
  assert list(results['optim.step_fractions']) == ['(0.8, 0.9)', '(0.5, 0.75)']


class Launched:
  """The launcher in a process of its own, with the stand-in for experiments.run."""

  def __init__(self, tmp_path, text, *, step_s):
    self.folder = tmp_path / 'sweep'
    file = tmp_path / 'sweep.py'
    file.write_text(f'from sweeps import space\nCONFIG = {str(CONFIG)!r}\n{text}')
    program = (
      'import sys; from sweeps import rows, run; '
      f"rows.PROGRAM = ('-S', {FAKE!r}); sys.exit(run.main(sys.argv))"
    )
    self._command = [sys.executable, '-c', program, f'--sweep={file}', f'--workdir={self.folder}']
    self._env = os.environ | {'JAX_PLATFORMS': 'cpu', 'FAKE_STEP_S': str(step_s)}

  def start(self, *arguments):
    return subprocess.Popen(
      [*self._command, *arguments],
      cwd=ROOT,
      env=self._env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def steps_done(self):
    return sum(int(path.read_text() or 0) for path in self.folder.glob('rows/*/step'))

  def wait_for_steps(self, number, process):
    until = time.monotonic() + 120
    while self.steps_done() < number:
      assert process.poll() is None and time.monotonic() < until, process.communicate()
      time.sleep(0.01)

  def check_all_done_once(self):
    """Every row is there and has each of its steps once."""
    assert [r['state'] for r in records(self.folder)] == ['done'] * 4
    for path in self.folder.glob('rows/*'):
      rows = read_metrics(path).rows
      assert [r['step'] for r in rows if 'train/loss' in r] == list(range(1, 11))


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path):
  launched = Launched(tmp_path, FOUR, step_s=0.1)
  with launched.start('--jobs=2') as process:
    launched.wait_for_steps(4, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
  assert process.returncode == 130, out
  assert 'the same command resumes' in out
  done = launched.steps_done()
  assert 4 <= done < 40
  states = pd.read_csv(launched.folder / 'results.csv')['state']
  assert list(states) == ['stopped', 'stopped', 'waiting', 'waiting']
  with launched.start('--jobs=4') as process:
    out, _ = process.communicate(timeout=120)
  assert process.returncode == 0, out
  launched.check_all_done_once()
  assert sorted(r['starts'] for r in records(launched.folder)) == [1, 1, 2, 2]


@pytest.mark.slow
def test_a_second_ctrl_c_kills(tmp_path):
  launched = Launched(tmp_path, FOUR, step_s=600)
  with launched.start() as process:
    while not list(launched.folder.glob('rows/*/log.txt')):
      assert process.poll() is None
      time.sleep(0.01)
    time.sleep(0.5)  # the stand-in has set its handler, and sleeps
    for _ in range(2):
      process.send_signal(signal.SIGINT)
      time.sleep(0.5)
    process.communicate(timeout=30)
  assert process.returncode == 130


@pytest.mark.chaos
def test_a_killed_launcher_takes_its_rows_along_and_none_is_lost_or_repeated(tmp_path):
  launched = Launched(tmp_path, FOUR, step_s=0.05)
  for kill in range(2):
    with launched.start('--jobs=2') as process:
      launched.wait_for_steps(launched.steps_done() + 3 + kill, process)
      process.kill()
    time.sleep(0.3)
    seen = launched.steps_done()
    time.sleep(0.3)
    assert launched.steps_done() == seen, 'a run goes on without its launcher'
  with launched.start('--jobs=2') as process:
    out, _ = process.communicate(timeout=120)
  assert process.returncode == 0, out
  launched.check_all_done_once()
