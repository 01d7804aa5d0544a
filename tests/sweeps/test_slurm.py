"""The same sweep through a real Slurm of one node: `uv run pytest -m slurm`.

Needs root, and Debian's `apt-get install slurm-wlm munge`; skipped elsewhere. one_node_slurm.py
says how the cluster is made.
"""

import json
import os
import signal
import subprocess
import threading

import pytest

from sweeps import slurm
from tests.run.program import DEPRECATED
from tests.sweeps import one_node_slurm

pd = pytest.importorskip('pandas')
pytest.importorskip('submitit')
pytestmark = [pytest.mark.slurm, pytest.mark.filterwarnings(DEPRECATED)]

FOUR = "def sweep():\n  return space.grid({'optim.lr_peak': [1e-3, 9.0, 2e-3, 3e-3]})\n"
SLURM = ('--launcher=slurm', '--slurm=partition=debug,time=5,cpus_per_task=1', '--jobs=2')


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
  if reason := one_node_slurm.missing():
    pytest.skip(reason)
  with one_node_slurm.cluster(tmp_path_factory.mktemp('slurm')) as env:
    yield env


@pytest.fixture(autouse=True)
def user(cluster, monkeypatch):
  for name in ('SLURM_CONF', 'PATH'):
    monkeypatch.setenv(name, cluster[name])


def queue():
  answer = subprocess.run(['squeue', '-h', '-r', '-o', '%i %T'], capture_output=True, text=True)
  return answer.stdout.splitlines()


def test_rows_are_tasks_of_one_array_and_end_like_local_ones(sweep, tmp_path):
  code, out, err = sweep(FOUR, *SLURM)
  assert (code, err) == (1, '')
  assert '3 done, 1 failed' in out
  results = pd.read_csv(tmp_path / 'sweep' / 'results.csv')
  assert list(results['state']) == ['done', 'failed', 'done', 'done']
  assert results['error'][1] == 'lr_peak=9 is too much. Lower it.'
  jobs = {path.name.split('_')[0] for path in (tmp_path / 'sweep' / 'slurm').glob('*_result.pkl')}
  assert len(jobs) == 1, 'one array'
  assert queue() == []


def test_jobs_outlive_the_launcher_and_are_found_again(sweep, tmp_path, monkeypatch):
  monkeypatch.setenv('FAKE_STEP_S', '0.5')
  leave = threading.Timer(6, os.kill, (os.getpid(), signal.SIGINT))
  leave.start()
  code, out, _ = sweep(FOUR, *SLURM)
  assert code == 130
  assert 'jobs stay in the queue' in out
  assert queue()
  code, out, _ = sweep(FOUR, *SLURM)
  assert code == 1
  assert '3 done, 1 failed' in out
  for path in (tmp_path / 'sweep').glob('rows/*/row.json'):
    assert json.loads(path.read_text())['starts'] == 1, 'nothing was submitted twice'


def test_a_cancelled_job_saves_and_the_same_command_goes_on_with_it(sweep, tmp_path, monkeypatch):
  one = "def sweep():\n  yield {'seed': 1}\n"
  monkeypatch.setenv('FAKE_STEP_S', '1')
  cancel = threading.Timer(5, lambda: subprocess.run(['scancel', '--me'], check=True))
  cancel.start()
  assert sweep(one, *SLURM)[0] == 1
  [record] = [json.loads(p.read_text()) for p in (tmp_path / 'sweep').glob('rows/*/row.json')]
  assert record['state'] == 'stopped'
  monkeypatch.setenv('FAKE_STEP_S', '0')
  assert sweep(one, *SLURM)[0] == 0
  steps = pd.read_csv(tmp_path / 'sweep' / 'steps.csv')
  assert list(steps[steps['metric'] == 'train/loss']['step']) == list(range(1, 11))


def test_a_job_that_vanishes_is_a_failed_row(sweep, tmp_path, monkeypatch):
  monkeypatch.setattr(slurm, 'ASK_S', 0)
  monkeypatch.setattr(slurm, '_queue', set)
  monkeypatch.setenv('FAKE_STEP_S', '1')  # it would be done before it is missed
  code, _, _ = sweep("def sweep():\n  yield {'seed': 1}\n", *SLURM)
  subprocess.run(['scancel', '--me'], check=True)
  assert code == 1
  [record] = [json.loads(p.read_text()) for p in (tmp_path / 'sweep').glob('rows/*/row.json')]
  assert (record['state'], record['error']) == ('failed', 'ended without a word.')


def test_a_search_prunes_through_slurm(sweep, tmp_path, monkeypatch):
  pytest.importorskip('optuna')
  monkeypatch.setenv('FAKE_STEP_S', '0.5')
  text = """
import optuna
TRIALS = 2
STUDY = dict(
  sampler=optuna.samplers.GridSampler({'lr': [1e-3, 5e-3]}, seed=1),
  pruner=optuna.pruners.ThresholdPruner(upper=1.35, n_warmup_steps=4),
)
def search(trial):
  return {'optim.lr_peak': trial.suggest_float('lr', 1e-3, 5e-3)}
"""
  assert sweep(text, *SLURM)[0] == 0
  results = pd.read_csv(tmp_path / 'sweep' / 'results.csv').sort_values('optim.lr_peak')
  assert list(results['state']) == ['done', 'pruned']


@pytest.mark.parametrize(
  ('flag', 'part'),
  [
    ('partition=nowhere', 'sbatch refuses the jobs'),
    ('partitoin=debug', 'partitoin'),
    ('partition', "'partition' has no value"),
  ],
)
def test_what_slurm_cannot_do_is_one_line(sweep, flag, part):
  code, _, err = sweep(FOUR, '--launcher=slurm', f'--slurm={flag}')
  assert code == 2
  [line] = err.splitlines()
  assert line.startswith('error: ')
  assert part in line
