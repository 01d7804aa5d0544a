"""The screen is plain where nobody looks, alive where somebody does, and never chatty."""

import io
import itertools
import logging
import re
import sys

import pytest

from experiments.screen import Card, Component, Progress, describe, make_console, print_card

VALUES = {
  'train/loss': 5.1234,
  'train/tokens_per_s': 12_345.0,
  'train/grad_norm': 0.512,
  'router/max_vio': [0.1, 0.32],
}
CARD = Card(
  title='quickstart [not markup]',
  overrides=['steps=300', 'optim.lr_peak=1e-3'],
  devices='2 x cpu',
  mesh={'data': 2, 'expert': 1, 'model': 1},
  components=[Component('routed experts', 3_000_000, 750_000), Component('attention', 1000, 1000)],
  tokens_per_step=4096,
  flops_per_token=9.3e6,
  bytes_per_device=312 * 2**20,
  facts={'precision': 'float32'},
)


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def run(num_steps, step_s, *, start=0, total=None, **kwargs):
  """Plain lines of a run whose steps take `step_s`."""
  out, clock = io.StringIO(), Clock()
  total = total or num_steps
  with Progress(total, start, console=make_console(out), clock=clock, **kwargs) as progress:
    for step in range(start + 1, num_steps + 1):
      clock.now += step_s
      progress.update(step, VALUES)
  return out.getvalue().splitlines()


@pytest.fixture
def coloured_environment(monkeypatch):
  monkeypatch.setenv('FORCE_COLOR', '1')
  monkeypatch.setenv('CLICOLOR_FORCE', '1')
  monkeypatch.setenv('TTY_COMPATIBLE', '1')


@pytest.mark.usefixtures('coloured_environment')
def test_card_without_a_terminal_has_no_control_codes_or_trailing_blanks():
  out = io.StringIO()
  print_card(CARD, console=make_console(out))
  assert '\x1b' not in out.getvalue()
  assert all(line == line.rstrip() for line in out.getvalue().split('\n'))


def test_card_says_everything_that_is_about_to_run():
  out = io.StringIO()
  print_card(CARD, console=make_console(out))
  lines = [' '.join(line.split()) for line in out.getvalue().splitlines()]
  assert lines[0] == 'quickstart [not markup]'
  for line in (
    'overrides steps=300',
    'optim.lr_peak=1e-3',
    'devices 2 x cpu',
    'mesh data 2, expert 1, model 1',
    'routed experts 3.00M 100.0% 750k',
    'all 3.00M 751k',
    'tokens per step 4,096',
    'FLOPs per token 9.30M',
    'memory per device 312.0 MiB predicted',
    'precision float32',
  ):
    assert line in lines


@pytest.mark.parametrize('columns', [80, 120])
def test_card_fits_a_terminal(monkeypatch, columns):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', str(columns))
  monkeypatch.setenv('NO_COLOR', '1')
  out = Terminal()
  print_card(CARD, console=make_console(out))
  text = re.sub('\x1b\\[[0-9;]*m', '', out.getvalue())
  assert '\x1b' not in text
  assert max(len(line) for line in text.splitlines()) <= columns


@pytest.mark.usefixtures('coloured_environment')
def test_plain_line_reads_as_promised():
  lines = run(300, 1.0, start=49)
  assert lines[0] == 'step  50/300  loss 5.123  12.3k tok/s  grad 0.51  load 1.32x  left --'
  assert lines[1] == 'step  55/300  loss 5.123  12.3k tok/s  grad 0.51  load 1.32x  left 4m05s'
  assert lines[-1] == 'step 300/300  loss 5.123  12.3k tok/s  grad 0.51  load 1.32x  took 4m11s'


def steps_of(lines):
  return [int(line.split()[1].split('/')[0]) for line in lines]


@pytest.mark.parametrize('step_s', [0.01, 0.3, 1.0, 4.9])
def test_plain_lines_never_come_more_often_than_promised(step_s):
  steps = steps_of(run(200, step_s))
  assert (steps[0], steps[-1]) == (1, 200)
  gaps_s = [(b - a) * step_s for a, b in itertools.pairwise(steps[:-1])]  # the last is always shown
  assert all(gap >= 5.0 - 1e-9 for gap in gaps_s)


def test_plain_lines_show_every_step_that_is_slow():
  assert steps_of(run(4, 30.0)) == [1, 2, 3, 4]


def test_plain_run_that_stops_early_still_shows_its_last_step():
  assert steps_of(run(7, 0.1, total=300)) == [1, 7]


def test_plain_run_shows_no_step_twice():
  assert steps_of(run(1, 0.1)) == [1]


def test_note_without_a_terminal_is_one_plain_line():
  out = io.StringIO()
  with Progress(10, 0, console=make_console(out)) as progress:
    progress.note('eval 10/10  loss 4.2 [bold] ' + 'x' * 200)
  assert out.getvalue() == 'eval 10/10  loss 4.2 [bold] ' + 'x' * 200 + '\n'


def test_time_left_starts_over_after_a_rollback():
  out, clock = io.StringIO(), Clock()
  with Progress(100, 0, console=make_console(out), clock=clock, interval_s=0.0) as progress:
    for step in (1, 2, 3, 2, 3):
      clock.now += 1
      progress.update(step, {})
  left = [line.split('left ')[1] for line in out.getvalue().splitlines()]
  assert left == ['--', '1m38s', '1m37s', '--', '1m37s']


def test_describe_leaves_out_what_was_not_measured():
  assert describe({'train/loss': float('nan'), 'router/max_vio': []}) == 'loss nan'


def test_describe_tells_of_a_refused_step():
  assert describe(VALUES | {'guard/skipped': 1}).endswith('refused')


def test_bar_on_a_terminal_keeps_warnings_whole_and_gives_streams_back(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '80')
  monkeypatch.setenv('NO_COLOR', '1')
  out = Terminal()
  monkeypatch.setattr(sys, 'stdout', out)
  monkeypatch.setattr(sys, 'stderr', out)
  handler = logging.StreamHandler()
  logger = logging.getLogger('test_screen')
  logger.addHandler(handler)
  try:
    with Progress(10, 0, console=make_console(out)) as progress:
      progress.update(1, VALUES)
      logger.error('logged')
      sys.stderr.write('printed\n')
      progress.note('noted')
      progress.update(10, VALUES)
    assert handler.stream is out
  finally:
    logger.removeHandler(handler)
  lines = [line.split('\x1b')[-1] for line in out.getvalue().replace('\r', '\n').splitlines()]
  for word in ('logged', 'printed', 'noted'):
    assert sum(line.endswith(word) for line in lines) == 1
  assert '10/10' in out.getvalue()
  assert 'load 1.32x' in out.getvalue()


def test_bar_is_not_drawn_on_a_dumb_terminal(monkeypatch):
  monkeypatch.setenv('TERM', 'dumb')
  out = Terminal()
  with Progress(2, 0, console=make_console(out)) as progress:
    progress.update(1, VALUES)
  assert out.getvalue().startswith('step 1/2')
  assert '\x1b' not in out.getvalue()
