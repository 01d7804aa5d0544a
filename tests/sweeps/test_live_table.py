"""The live table fits its screen; without a terminal every change is one plain line."""

import io

import pytest
from rich.console import Console

from sweeps import space
from sweeps.record import Follower, Record, State
from sweeps.rows import Base, make_rows
from sweeps.screen import Screen, short_labels
from tests.run.program import CONFIG, DEPRECATED

pytestmark = pytest.mark.filterwarnings(DEPRECATED)


def rows_of(tmp_path, *parts):
  return make_rows(space.grid(*parts), Base(str(CONFIG), (), tmp_path))


def made(rows, **states):
  """Records by the state that is asked for by row number, the rest waiting; no metrics yet."""
  records = {row: Record(State(states.get(f'row{row.number}', 'waiting'))) for row in rows}
  return records, {row: Follower(row.workdir) for row in rows}


def test_the_live_table_shows_what_matters_where_not_all_rows_fit(tmp_path):
  rows = rows_of(tmp_path, {'seed': range(40)})
  records, progress = made(rows, row3='done', row20='running', row33='failed')
  file = io.StringIO()
  console = Console(file=file, force_terminal=True, width=80, height=12, color_system=None)
  with Screen(console) as screen:
    screen.update(rows, records, progress)
  text = file.getvalue()
  for part in ('seed=19', 'running', 'seed=32', 'failed', 'seed=2', 'done'):
    assert part in text
  assert '37 waiting, 1 running, 1 done, 1 failed, 32 not shown' in text


def test_without_a_terminal_a_change_is_a_line_and_running_rows_speak_seldom(tmp_path):
  rows = rows_of(tmp_path, {'seed': range(2)})
  records, progress = made(rows, row1='running')
  file, now = io.StringIO(), [0.0]
  screen = Screen(Console(file=file, width=100), interval_s=30, clock=lambda: now[0])
  for second in range(50):
    now[0] = second
    screen.update(rows, records, progress)
  records[rows[0]].state, records[rows[0]].error = State.FAILED, 'too much. Lower it.'
  progress[rows[0]].step = 7
  screen.update(rows, records, progress)
  lines = file.getvalue().splitlines()
  assert lines[:2] == ['row 1/2 running  seed=0'] * 2
  [last] = lines[2:]
  assert last.startswith('row 1 failed  seed=0: too much. Lower it.  (log: ')


def test_labels_leave_out_what_all_rows_share(tmp_path):
  rows = rows_of(tmp_path, {'seed': range(2), 'optim.lr_peak': [1e-3], 'steps': [3, 4]})
  assert list(short_labels(rows).values())[:2] == ['seed=0, steps=3', 'seed=0, steps=4']
