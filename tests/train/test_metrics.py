"""The metrics file is strict JSON and never holds a step twice, whatever ends the process."""

import json
import math
import sys
import types

import numpy as np
import pytest

from moe_jax.config import LogConfig
from moe_jax.train.metrics import FILE, MetricsWriter, read_metrics

QUIET = LogConfig(tensorboard=False)
CONFIG = {'steps': 3, 'model': {'num_dense_layers': 1}}


def open_writer(workdir, *, last_step=0, log=QUIET):
  return MetricsWriter(workdir, log, config=CONFIG, last_step=last_step)


def written(workdir, steps):
  writer = open_writer(workdir)
  for step in steps:
    writer.write(step, {'train/loss': 10.0 - step})
  writer.close()
  return workdir / FILE


def strict_rows(path):
  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_write_is_on_disk_before_the_next_step(tmp_path):
  writer = open_writer(tmp_path)
  writer.write(1, {'train/loss': 5.5})
  assert strict_rows(tmp_path / FILE) == [{'step': 1, 'train/loss': 5.5}]
  writer.close()


def test_write_takes_numpy_scalars_and_arrays(tmp_path):
  writer = open_writer(tmp_path)
  writer.write(1, {'a': np.float32(0.5), 'b': np.arange(3), 'c': np.bool_(True)})
  writer.close()
  assert strict_rows(tmp_path / FILE) == [{'step': 1, 'a': 0.5, 'b': [0, 1, 2], 'c': 1}]


def test_nan_and_infinity_survive_in_strict_json(tmp_path):
  values = [math.nan, math.inf, -math.inf, 1.5]
  writer = open_writer(tmp_path)
  for step, value in enumerate(values):
    writer.write(step, {'x': value, 'x_L': [value, 2.0]})
  writer.close()
  strict_rows(tmp_path / FILE)
  metrics = read_metrics(tmp_path)
  np.testing.assert_array_equal(metrics.series('x')[1], values)
  np.testing.assert_array_equal(metrics.series('x_L')[1][:, 0], values)


def test_series_has_one_row_a_recorded_step(tmp_path):
  writer = open_writer(tmp_path)
  for step in range(1, 5):
    writer.write(step, {'loss': 1.0, 'vio': [1.0, 2.0]})
    if step % 2 == 0:
      writer.write(step, {'load': [[1, 2, 3], [4, 5, 6]]})
  writer.close()
  metrics = read_metrics(tmp_path)
  steps, load_NLE = metrics.series('load')
  assert (steps.dtype, load_NLE.dtype) == (np.int64, np.float64)
  assert steps.tolist() == [2, 4]
  assert load_NLE.shape == (2, 2, 3)
  assert metrics.series('vio')[1].shape == (4, 2)
  assert metrics.series('loss')[1].shape == (4,)
  assert metrics.names == ['load', 'loss', 'vio']


def test_series_of_no_layers_is_empty_not_an_error(tmp_path):
  writer = open_writer(tmp_path)
  writer.write(1, {'vio': []})
  writer.close()
  assert read_metrics(tmp_path).series('vio')[1].shape == (1, 0)


def test_series_takes_the_later_of_two_lines_for_one_step(tmp_path):
  writer = open_writer(tmp_path)
  writer.write(0, {'eval/loss': 8.0})
  writer.write(0, {'eval/loss': 9.0})
  writer.close()
  assert read_metrics(tmp_path).series('eval/loss')[1].tolist() == [9.0]


def test_series_of_a_misspelt_name_suggests_the_right_one(tmp_path):
  written(tmp_path, [1])
  with pytest.raises(ValueError, match='Did you mean train/loss'):
    read_metrics(tmp_path).series('train/los')


def test_reading_a_folder_without_metrics_is_one_clear_line(tmp_path):
  with pytest.raises(ValueError, match='does not exist'):
    read_metrics(tmp_path)


@pytest.mark.parametrize('cut', [1, 5, 20])
def test_torn_last_line_is_skipped_by_the_reader_and_dropped_on_resume(tmp_path, cut):
  path = written(tmp_path, [1, 2, 3])
  whole = path.read_bytes()
  path.write_bytes(whole[: -1 - cut])
  metrics = read_metrics(tmp_path)
  assert metrics.unreadable == 1
  assert metrics.series('train/loss')[0].tolist() == [1, 2]
  writer = open_writer(tmp_path, last_step=3)
  writer.write(3, {'train/loss': 7.0})
  writer.close()
  assert path.read_bytes() == whole


def test_last_line_without_its_newline_is_not_glued_to_the_next(tmp_path):
  path = written(tmp_path, [1, 2])
  path.write_bytes(path.read_bytes()[:-1])
  writer = open_writer(tmp_path, last_step=2)
  writer.write(3, {'train/loss': 7.0})
  writer.close()
  assert [row['step'] for row in strict_rows(path)] == [1, 2, 3]


def test_resume_drops_the_steps_after_the_checkpoint(tmp_path):
  path = written(tmp_path, range(1, 8))
  writer = open_writer(tmp_path, last_step=4)
  writer.write(5, {'train/loss': 5.0})
  writer.close()
  assert [row['step'] for row in strict_rows(path)] == [1, 2, 3, 4, 5]


def test_rewind_keeps_events_and_goes_on_writing(tmp_path):
  writer = open_writer(tmp_path)
  for step in range(1, 5):
    writer.write(step, {'train/loss': 1.0})
  writer.event(4, 'rollback', to=2)
  writer.rewind(2)
  writer.write(3, {'train/loss': 2.0})
  writer.close()
  metrics = read_metrics(tmp_path)
  assert metrics.events == [{'step': 4, 'event': 'rollback', 'to': 2}]
  assert metrics.series('train/loss')[1].tolist() == [1.0, 1.0, 2.0]


def test_rewind_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
  path = written(tmp_path, [1, 2, 3])
  before = path.read_bytes()

  def full(_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('moe_jax.train.metrics.os.fsync', full)
  with pytest.raises(OSError, match='No space'):
    open_writer(tmp_path, last_step=1)
  assert path.read_bytes() == before


def test_missing_tracker_names_the_remedy_and_writes_nothing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ValueError, match='uv sync --extra tracking') as error:
    open_writer(tmp_path / 'run', log=LogConfig(tracker='wandb'))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_tracker_gets_one_curve_a_layer_and_one_name_over_resumes(tmp_path, monkeypatch):
  calls = []
  fake = types.ModuleType('trackio')
  fake.__dict__.update(
    init=lambda **kw: calls.append(kw['name']),
    log=lambda values, step: calls.append((step, values)),
    finish=lambda: calls.append('finish'),
  )
  monkeypatch.setitem(sys.modules, 'trackio', fake)
  for step in (1, 2):
    log = LogConfig(tensorboard=False, tracker='trackio')
    writer = open_writer(tmp_path, log=log, last_step=step - 1)
    writer.write(step, {'loss': 3.0, 'vio': [0.5, 0.25], 'load': [[1, 2], [3, 4]]})
    writer.close()
  assert calls[1] == (1, {'loss': 3.0, 'vio/layer_01': 0.5, 'vio/layer_02': 0.25})
  assert calls[0] == calls[3]
  assert calls[2] == calls[5] == 'finish'


def events_of(folder):
  from tensorboardX.proto import event_pb2

  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:  # TFRecord: length, its checksum, the event, its checksum
      size = int.from_bytes(data[:8], 'little')
      yield event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]


def test_tensorboard_names_layers_as_the_model_does(tmp_path, caplog):
  writer = open_writer(tmp_path, log=LogConfig())
  load = [[1, 2, 3], [3, 2, 1]]
  writer.write(1, {'train/loss': math.nan, 'router/max_vio': [0.5, 0.25], 'router/load': load})
  writer.close()
  values = {v.tag: v for event in events_of(tmp_path / 'tb') for v in event.summary.value}
  assert math.isnan(values['train/loss'].simple_value)
  assert values['router/max_vio/layer_02'].simple_value == 0.25
  assert values['router/load/layer_01'].histo.num == 3
  assert 'config/text_summary' in values
  assert not caplog.records


def test_tensorboard_is_told_to_forget_what_a_resume_makes_again(tmp_path):
  for last_step in (0, 7):
    open_writer(tmp_path, log=LogConfig(), last_step=last_step).close()
  starts = [e.step for e in events_of(tmp_path / 'tb') if e.HasField('session_log')]
  assert starts == [1, 8]
