"""Every row is checked before anything starts; a wrong one is named with its remedy."""

import pytest

from moe_jax.train.workdir import Workdir
from sweeps.rows import name_of
from tests.run.program import DEPRECATED

pytestmark = pytest.mark.filterwarnings(DEPRECATED)

GOOD = "{'seed': 0}"


@pytest.mark.parametrize(
  ('row', 'parts'),
  [
    ("{'optim.lr_peek': 1e-3}", ['optim.lr_peek=0.001', 'not a field', 'Did you mean lr_peak?']),
    ("{'balance': 'los_free'}", ['balance=los_free', 'not a balancing idea', 'loss_free?']),
    ("{'balance': 'gshard', 'model.moe.top_k': 1}", ['top_k=2, not 1', 'use switch']),
    ("{'model.moe.top_k': 99}", ['top_k=99', 'num_experts=8', 'Lower top_k']),
    ("{'steps': 1.5}", ["config.steps='1.5' must be int"]),
    ("{'steps': 'many'}", ['steps=many', 'must be int']),
    ("{'optim.lr_peak': None}", ['optim.lr_peak=None is a NoneType']),
    ("{'model.vocab_size': 8}", ['model.vocab_size=8', '257 ids']),
    ("{'log.tracker': 'tensorbord'}", ['log.tracker', 'wandb']),
  ],
  ids=lambda v: v if isinstance(v, str) else '',
)
def test_a_wrong_row_is_one_line_with_its_number_and_nothing_starts(sweep, tmp_path, row, parts):
  code, out, err = sweep(f'def sweep():\n  yield {GOOD}\n  yield {row}\n')
  assert (code, out) == (2, '')
  [line] = err.splitlines()
  assert line.startswith('error: row 2 (')
  for part in parts:
    assert part in line
  assert not (tmp_path / 'sweep').exists()


def test_all_wrong_rows_are_told_at_once_up_to_ten(sweep):
  code, _, err = sweep("def sweep():\n  return space.grid({'steps': range(-13, 1)})\n")
  lines = err.splitlines()
  assert code == 2
  assert len(lines) == 11
  assert lines[0].startswith('error: row 1 (steps=-13): config.steps=-13 must be positive')
  assert lines[-1] == 'error: and 4 more rows like these.'


def test_two_rows_that_are_the_same_run_are_refused(sweep):
  text = "def sweep():\n  yield {'seed': 1}\n  yield {'steps': 12, 'seed': 1}\n"
  code, _, err = sweep(text)
  assert code == 2
  assert 'row 2 (steps=12, seed=1) is the same run as row 1 (seed=1)' in err


def test_a_row_whose_folder_has_another_config_is_refused(sweep, tmp_path):
  folder = tmp_path / 'sweep' / 'rows' / name_of({'seed': 3})
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text('{"seed": 3, "microbatches": 2}')
  code, _, err = sweep("def sweep():\n  yield {'seed': 3}\n")
  assert code == 2
  assert 'row 1 (seed=3): ' in err
  assert 'microbatches: 2 -> 1' in err


@pytest.mark.parametrize(
  ('text', 'part'),
  [
    ('def sweep(:', 'is not Python'),
    ('1 / 0', 'division by zero'),
    ('x = 1', 'must define either sweep()'),
    ('def sweep():\n  return []', 'has no rows'),
    ('def sweep():\n  return [3]', 'row 1 is 3. Yield dicts'),
  ],
)
def test_a_file_that_is_no_sweep_is_one_line(sweep, text, part):
  code, _, err = sweep(text)
  [line] = err.splitlines()
  assert code == 2
  assert part in line


def test_flags_that_cannot_be_obeyed_are_one_line(sweep, tmp_path):
  text = f'def sweep():\n  yield {GOOD}\n'
  for flag, part in [
    ('--jobs=0', 'jobs'),
    ('--launcher=lsf', '--launcher=lsf is not one of local, slurm'),
    ('--jobs=2 --devices=0', 'names 1 for --jobs=2'),
    ('--config.seed=4', '--config.seed=4 is also set by the row'),
    ('--wokrdir=x', 'wokrdir'),
  ]:
    code, _, err = sweep(text, *flag.split())
    assert code == 2
    assert len(err.splitlines()) == 1
    assert part in err
  assert not (tmp_path / 'sweep').exists()


def test_a_sweep_in_use_is_refused(sweep, tmp_path):
  about = {'sweep': 'other', 'config': '', 'common': []}
  with Workdir.open(tmp_path / 'sweep', about, may_change=()):
    code, _, err = sweep(f'def sweep():\n  yield {GOOD}\n')
  assert code == 2
  assert 'in use by' in err


def test_names_do_not_depend_on_order_and_tell_values_apart():
  names = [name_of({'seed': 1, 'balance': 'a+b'}), name_of({'balance': 'a+b', 'seed': 1})]
  assert names[0].rpartition('-')[2] == names[1].rpartition('-')[2]
  assert names[0].startswith('seed=1_balance=a+b-')
  assert name_of({'x': 'a/b'}) != name_of({'x': 'a-b'})
  assert '/' not in name_of({'x': '../../etc'})
