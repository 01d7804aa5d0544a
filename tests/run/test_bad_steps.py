"""What the guard does to a run: refusals, rollbacks, giving up; and stops between two steps."""

import signal

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.data.pipeline import RowSource
from moe_jax.train import loop, step
from moe_jax.train.metrics import read_metrics
from moe_jax.train.workdir import Workdir
from tests.run.program import ONE_DEVICE, bits, checkpoint_steps, lines, restore

pytestmark = pytest.mark.slow

GUARD = {'guard.rollback_after': 3, 'guard.max_rollbacks': 1}


@pytest.fixture(scope='module', autouse=True)
def compile_once(tmp_path_factory):
  """All tests of this file train the same functions."""
  before = (
    jax.config.jax_compilation_cache_dir,
    jax.config.jax_persistent_cache_min_compile_time_secs,
  )
  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('compiled')))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  compilation_cache.reset_cache()
  yield
  jax.config.update('jax_compilation_cache_dir', before[0])
  jax.config.update('jax_persistent_cache_min_compile_time_secs', before[1])
  compilation_cache.reset_cache()


@pytest.fixture(scope='module', autouse=True)
def nan_for_strange_tokens():
  """No row of integers makes a loss NaN by itself, so here ids beyond the vocabulary do."""
  real = step.mean_loss

  def mean_loss(cfg, model, params, router, part, *, num_targets):
    loss, seen = real(cfg, model, params, router, part, num_targets=num_targets)
    factor = jnp.where(part['tokens'].max() >= cfg.model.vocab_size, jnp.nan, 1.0)
    return loss * factor, seen | {'loss': seen['loss'] * factor}

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step, 'mean_loss', mean_loss)
    yield


class Screen:
  """Keeps the notes; calls `on_step` in the middle of the loop."""

  def __init__(self, on_step=lambda done: None):
    self.notes, self._on_step = [], on_step

  def update(self, step, values):
    self._on_step(step)

  def note(self, text):
    self.notes.append(text)


class Changed:
  """A source whose batches are others: `where(i)` is what stands in place of batch i.

  A batch of None has token ids that no vocabulary has, at which `nan_for_strange_tokens` aims.
  """

  def __init__(self, source, batch_size, where):
    self._source, self._batch_size, self._where = source, batch_size, where
    self.tokenizer = source.tokenizer

  def row(self, g):
    batch, within = divmod(g, self._batch_size)
    other = self._where(batch)
    row = self._source.row((batch if other is None else other) * self._batch_size + within)
    return row | {'tokens': row['tokens'] + 10**6} if other is None else row


def train(cfg, path, *, where=lambda batch: batch, screen=None):
  def sources(split):
    source = RowSource(cfg.data, seed=cfg.seed, split=split)
    return Changed(source, cfg.data.batch_size, where) if split == 'train' else source

  with (
    jax.set_mesh(sh.make_mesh(ONE_DEVICE)),
    Workdir.open(path, config_io.to_dict(cfg), may_change=('steps',)) as workdir,
  ):
    return loop.train(cfg, workdir, screen or Screen(), sources=sources)


@pytest.fixture(scope='module')
def clean(program, tmp_path_factory):
  """The workdir of a run on ordinary batches."""
  path = tmp_path_factory.mktemp('clean')
  assert train(program.config(**GUARD), path).done
  return path


def test_a_nan_batch_changes_nothing_but_counters(program, tmp_path):
  cfg = program.config(**GUARD, steps=9)
  screen = Screen()
  train(cfg, tmp_path, where=lambda i: None if i == 8 else i, screen=screen)
  before, after = restore(tmp_path, step=8), restore(tmp_path, step=9)
  for part in ('params', 'router', 'opt'):
    assert bits(getattr(after, part)) == bits(getattr(before, part)), part
  assert bits(after.guard.samples_W2) == bits(before.guard.samples_W2)
  assert (int(after.step), int(after.batch)) == (9, 9)
  assert (int(after.guard.skipped), int(after.guard.streak)) == (1, 1)
  assert 'step 9: refused (loss nan, gradient norm nan)' in screen.notes
  last = [row for row in lines(tmp_path) if 'train/loss' in row][-1]
  assert (last['step'], last['train/loss'], last['guard/skipped']) == (9, 'nan', 1)


def test_a_refused_step_is_not_saved_as_a_place_to_go_back_to(program, tmp_path):
  train(program.config(**GUARD), tmp_path, where=lambda i: None if i == 7 else i)
  assert checkpoint_steps(tmp_path) == [0, 4, 12]


def test_training_after_a_nan_batch_is_training_without_it(program, clean, tmp_path):
  cfg = program.config(**GUARD, steps=13)
  train(cfg, tmp_path, where=lambda i: None if i == 5 else i - (i > 5))
  found, expected = restore(tmp_path, step=13), restore(clean, step=12)
  for part in ('params', 'router', 'opt'):
    assert bits(getattr(found, part)) == bits(getattr(expected, part)), part


def test_a_streak_rolls_back_and_goes_on_behind_the_bad_batches(program, tmp_path):
  cfg, screen = program.config(**GUARD), Screen()
  rolled, skipping = tmp_path / 'rolled', tmp_path / 'skipping'
  finished = train(cfg, rolled, where=lambda i: None if 5 <= i < 8 else i, screen=screen)
  assert finished.done
  assert any('back to step 4, and on with batch 8' in note for note in screen.notes)

  train(cfg, skipping, where=lambda i: i + 4 * (i >= 4))
  found, expected = restore(rolled), restore(skipping)
  for part in ('params', 'router', 'opt'):
    assert bits(getattr(found, part)) == bits(getattr(expected, part)), part
  assert bits(found.guard.samples_W2) == bits(expected.guard.samples_W2)
  assert int(found.batch) == int(expected.batch) + 4
  assert (int(found.guard.skipped), int(found.guard.rollbacks)) == (3, 1)

  metrics = read_metrics(rolled)
  steps = [row['step'] for row in metrics.rows if 'train/loss' in row]
  assert steps == list(range(1, 13))
  [event] = metrics.events
  assert (event['event'], event['step'], event['from_step']) == ('rollback', 4, 8)


def test_bad_batches_without_end_are_given_up(program, tmp_path):
  with pytest.raises(loop.GaveUp, match=r'[34] steps refused in a row after 1 rollbacks'):
    train(program.config(**GUARD), tmp_path, where=lambda i: None if i >= 5 else i)
  assert [e['event'] for e in read_metrics(tmp_path).events] == ['rollback', 'gave_up']
  assert checkpoint_steps(tmp_path) == [0, 4]


def test_a_program_that_gives_up_exits_with_one_and_a_report(program, tmp_path):
  result = program.run(
    tmp_path / 'run',
    '--config.optim.lr_peak=1e30',
    '--config.guard.rollback_after=2',
    '--config.guard.max_rollbacks=1',
  )
  assert result.code == 1, result
  [line] = result.err.splitlines()
  assert line.startswith('given up: step ')
  assert 'Lower optim.lr_peak' in line
  assert (tmp_path / 'run' / 'report.md').is_file()


def test_a_stop_between_checkpoints_resumes_bit_for_bit(program, clean, tmp_path):
  cfg = program.config(**GUARD)
  terminate = Screen(lambda done: done == 5 and signal.raise_signal(signal.SIGTERM))
  stopped = train(cfg, tmp_path, screen=terminate)
  assert not stopped.done
  assert checkpoint_steps(tmp_path)[-1] == int(stopped.state.step) == 6
  assert train(cfg, tmp_path).done
  assert bits(restore(tmp_path)) == bits(restore(clean))
  assert lines(tmp_path) == lines(clean)


def test_threads_and_processes_do_not_change_a_bit(program, clean, straight):
  assert bits(restore(clean)) == bits(restore(straight))
