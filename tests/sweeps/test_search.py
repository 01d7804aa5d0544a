"""A search proposes rows, learns from their losses, prunes, and resumes."""

import json
import os
import signal
import threading
import time

import pytest

from tests.run.program import DEPRECATED

optuna = pytest.importorskip('optuna')
pd = pytest.importorskip('pandas')
pytestmark = pytest.mark.filterwarnings(DEPRECATED)

SEARCH = """
TRIALS = 4
def search(trial):
  return {'optim.lr_peak': trial.suggest_float('lr', 1e-4, 1e-2, log=True)}
"""
PRUNED = """
import optuna
TRIALS = 2
STUDY = dict(
  sampler=optuna.samplers.GridSampler({'lr': [1e-3, 2e-2]}, seed=1),
  pruner=optuna.pruners.ThresholdPruner(upper=2.5),
)
def search(trial):
  return {'optim.lr_peak': trial.suggest_float('lr', 1e-3, 2e-2)}
"""


def trials(folder):
  study = optuna.load_study(storage=f'sqlite:///{folder / "study.db"}', study_name='sweep')
  return study.get_trials()


def test_trials_are_rows_with_their_losses_in_the_study(sweep, tmp_path):
  assert sweep(SEARCH, '--jobs=2')[0] == 0
  found = trials(tmp_path / 'sweep')
  assert [t.state.name for t in found] == ['COMPLETE'] * 4
  results = pd.read_csv(tmp_path / 'sweep' / 'results.csv').sort_values('row')
  assert list(results['eval/loss']) == pytest.approx([t.value for t in found])
  assert found[0].intermediate_values[1] > found[0].value
  # the same command has nothing to do, and says the same
  assert sweep(SEARCH, '--jobs=2')[0] == 0
  assert len(trials(tmp_path / 'sweep')) == 4
  assert len(pd.read_csv(tmp_path / 'sweep' / 'results.csv')) == 4


def test_a_run_that_lags_is_stopped_and_marked(sweep, tmp_path, monkeypatch):
  monkeypatch.setenv('FAKE_STEP_S', '0.25')
  assert sweep(PRUNED, '--jobs=2')[0] == 0
  results = pd.read_csv(tmp_path / 'sweep' / 'results.csv').sort_values('optim.lr_peak')
  assert list(results['state']) == ['done', 'pruned']
  assert sorted(t.state.name for t in trials(tmp_path / 'sweep')) == ['COMPLETE', 'PRUNED']
  [folder] = (tmp_path / 'sweep').glob('rows/lr_peak=0.02*')
  assert json.loads((folder / 'row.json').read_text())['state'] == 'pruned'
  assert int((folder / 'step').read_text()) < 10


def interrupt_when(folder, num_started):
  """Ctrl-C, once so many rows have done a step."""
  until = time.monotonic() + 60
  while len(list(folder.glob('rows/*/step'))) < num_started and time.monotonic() < until:
    time.sleep(0.05)
  os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_stopped_search_goes_on_with_the_trials_under_way(sweep, tmp_path, monkeypatch):
  monkeypatch.setenv('FAKE_STEP_S', '0.2')
  threading.Thread(target=interrupt_when, args=(tmp_path / 'sweep', 2)).start()
  assert sweep(SEARCH, '--jobs=2')[0] == 130
  before = trials(tmp_path / 'sweep')
  assert [t.state.name for t in before] == ['RUNNING'] * 2
  assert sweep(SEARCH, '--jobs=2')[0] == 0
  after = trials(tmp_path / 'sweep')
  assert [t.state.name for t in after] == ['COMPLETE'] * 4
  assert [t.params for t in after[:2]] == [t.params for t in before]
  starts = [
    json.loads(path.read_text())['starts'] for path in (tmp_path / 'sweep').glob('rows/*/row.json')
  ]
  assert sorted(starts) == [1, 1, 2, 2]


def test_a_failed_trial_does_not_end_the_search(sweep, tmp_path):
  text = SEARCH.replace('1e-4, 1e-2, log=True', '9, 9').replace('TRIALS = 4', 'TRIALS = 2')
  assert sweep(text)[0] == 1
  assert [t.state.name for t in trials(tmp_path / 'sweep')] == ['FAIL'] * 2


@pytest.mark.parametrize(
  ('body', 'part'),
  [
    ("{'optim.lr_peek': trial.suggest_float('x', 0, 1)}", 'Did you mean lr_peak?'),
    ("{'model.moe.top_k': trial.suggest_int('k', 1, 12)}", 'Lower top_k'),
    ('3', 'search(trial) returned 3'),
  ],
)
def test_an_impossible_search_is_refused_before_anything_starts(sweep, tmp_path, body, part):
  code, out, err = sweep(f'def search(trial):\n  return {body}\n')
  assert (code, out) == (2, '')
  [line] = err.splitlines()
  assert part in line
  assert not (tmp_path / 'sweep').exists()
