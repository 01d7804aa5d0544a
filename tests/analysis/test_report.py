"""The report says what the metrics say, for long, short, dense and broken runs."""

import json
import re

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from moe_jax.analysis import figures, human
from moe_jax.analysis.report import write_report
from moe_jax.config import LogConfig, ModelConfig, OptimConfig, RunConfig
from moe_jax.config_io import to_dict
from moe_jax.train.metrics import Metrics, MetricsWriter, read_metrics
from moe_jax.train.routing_record import Routing

SUMMARY = {
  'steps': 40,
  'tokens': 163_840,
  'seconds': 80.0,
  'tokens_per_s': 2100.0,
  'mfu': None,
  'memory_bytes': {'predicted': 2**30, 'peak': None},
  'eval': {'first_loss': 8.31, 'loss': 4.62, 'bits_per_byte': 2.2, 'unigram_loss': 6.02},
  'parameters': {'total': 2_412_345, 'active': 1_203_456},
  'max_vio': [0.12, 0.08],
  'sample': {'prompt': 'To be', 'text': ' ```or``` not | to be'},
  'command': 'python -m experiments.run --config=a.py --workdir=runs/a',
  'device': 'cpu',
  'date': '2025-01-31',
}


def make_run(workdir, *, steps=40, layers=2, experts=4, evals=True, bad_step=0):
  """A run whose loss falls by 0.1 a step from 8.0 and whose experts become even at the end."""
  config = to_dict(
    RunConfig(
      steps=steps, optim=OptimConfig(lr_peak=3e-3), model=ModelConfig(num_layers=layers + 1)
    )
  )
  writer = MetricsWriter(workdir, LogConfig(tensorboard=False), config=config, last_step=0)
  if evals:
    writer.write(0, {'eval/loss': 8.31})
  for step in range(1, steps + 1):
    bad = step == bad_step
    skew_E = np.linspace(1, -1, experts) * (steps - step) / max(1, steps - 1)
    load_LE = np.tile(100 * (1 + skew_E), (layers, 1))
    row = {
      'train/loss': float('nan') if bad else 8.1 - step / 10,
      'train/lr': 3e-3,
      'train/grad_norm': float('inf') if bad else 0.5,
      'router/max_vio': load_LE.max(-1) / 100 - 1,
      'router/entropy': np.full(layers, 0.9),
      'router/dead_experts': np.zeros(layers, int),
      'guard/skipped': int(bad),
      'guard/skipped_total': int(0 < bad_step <= step),
    }
    if step == 1 or step % 10 == 0:
      row['router/load'] = load_LE
    writer.write(step, row)
  if evals:
    writer.write(steps, {'eval/loss': 4.62})
  writer.close()
  (workdir / 'config.json').write_text(json.dumps(config))
  (workdir / 'summary.json').write_text(json.dumps(SUMMARY))
  return workdir


def title(figure):
  return ' '.join(figure.get_suptitle().split())


def test_loss_title_gives_both_ends_and_the_distance_to_the_baseline(tmp_path):
  figure = figures.loss_figure(read_metrics(make_run(tmp_path)), SUMMARY)
  assert title(figure) == (
    'Validation loss falls from 8.31 to 4.62, 1.40 below the unigram baseline'
  )


def test_loss_title_admits_a_loss_above_the_baseline(tmp_path):
  summary = {'eval': {'unigram_loss': 4.0}}
  figure = figures.loss_figure(read_metrics(make_run(tmp_path)), summary)
  assert title(figure).endswith('0.62 above the unigram baseline')


def test_loss_title_tells_of_training_where_nothing_was_evaluated(tmp_path):
  figure = figures.loss_figure(read_metrics(make_run(tmp_path, evals=False)), {})
  assert title(figure) == 'Training loss falls from 8.00 to 4.10'


def test_loss_picture_is_not_flattened_by_a_refused_step():
  rows = [{'step': s, 'train/loss': 5.0 - s / 100, 'guard/skipped': 0} for s in range(1, 60)]
  rows[30] |= {'train/loss': 1e4, 'guard/skipped': 1}
  figure = figures.loss_figure(Metrics(rows=rows, events=[]), {})
  assert figure.axes[0].get_ylim()[1] < 6


def test_load_title_gives_the_range_at_both_ends(tmp_path):
  figure = figures.load_figure(read_metrics(make_run(tmp_path)), first_layer=1)
  assert title(figure) == (
    'Expert load narrows from 0.00-2.00x of the mean at step 1 to 1.00-1.00x at 40'
  )
  assert [a.get_title('left') for a in figure.axes[:2]] == ['layer 1', 'layer 2']


def test_load_picture_centres_its_colours_on_the_mean(tmp_path):
  figure = figures.load_figure(read_metrics(make_run(tmp_path)))
  norm = figure.axes[0].collections[0].norm
  assert (norm(0.0), norm(1.0), norm(2.0)) == (0, 0.5, 1)


def test_load_picture_of_many_layers_shows_twelve_and_says_so(tmp_path):
  figure = figures.load_figure(read_metrics(make_run(tmp_path, steps=1, layers=26)))
  assert title(figure).endswith('(12 of 26 layers shown)')
  named = [a.get_title('left') for a in figure.axes if a.get_title('left')]
  assert (len(named), named[0], named[-1]) == (12, 'layer 0', 'layer 25')


def test_load_picture_of_a_long_run_has_a_bounded_number_of_columns():
  rows = [{'step': s, 'router/load': [[1.0, 3.0]]} for s in range(1, 3001)]
  figure = figures.load_figure(Metrics(rows=rows, events=[]))
  mesh = figure.axes[0].collections[0]
  assert mesh.get_array().shape == (2, figures.MAX_COLUMNS)
  np.testing.assert_allclose(mesh.get_array()[:, 7], [0.5, 1.5])


def test_balance_title_takes_the_worst_layer_of_the_summary(tmp_path):
  figure = figures.balance_figure(read_metrics(make_run(tmp_path)), SUMMARY)
  assert title(figure).startswith('MaxVio of the worst layer falls from 1.00 to 0.12;')
  assert 'no dead experts' in title(figure)


def test_optim_title_counts_refused_steps(tmp_path):
  figure = figures.optim_figure(read_metrics(make_run(tmp_path, bad_step=7)), clip_norm=1.0)
  assert title(figure) == (
    'Learning rate peaks at 0.003; gradient norm ends near 0.5; 1 of 40 steps refused'
  )


def test_smooth_keeps_a_constant_and_steps_over_nan():
  values = np.full(90, 2.0)
  values[[0, 40, 89]] = np.nan
  smoothed, window = figures.smooth(values)
  assert window == 3
  np.testing.assert_allclose(smoothed, 2.0)


def test_figures_leave_matplotlib_settings_alone(tmp_path):
  before = dict(matplotlib.rcParams)
  write_report(make_run(tmp_path))
  assert dict(matplotlib.rcParams) == before


def test_report_pictures_are_readable_and_linked(tmp_path):
  text = write_report(make_run(tmp_path, bad_step=7)).read_text()
  links = re.findall(r'!\[(.+)\]\((.+)\)', text)
  assert [path for _, path in links] == [
    f'report/{n}.png' for n in ('loss', 'load', 'balance', 'optim')
  ]
  for _, path in links:
    pixels = matplotlib.image.imread(tmp_path / path)
    assert pixels.shape[1] == 1200
    assert pixels[..., :3].std() > 0.01


def test_report_text_has_the_numbers_and_how_to_get_them_again(tmp_path):
  text = write_report(make_run(tmp_path)).read_text()
  expected = (
    '**4.620**',
    '8.310',
    '2.41M, 1.20M active',
    '164k tokens',
    '1m20s',
    '2.10k',
    '1.0 GiB predicted',
    SUMMARY['command'],
  )
  for part in (*expected, '| `optim.lr_peak` | `0.003` | `0.001` |', 'Run on cpu, 2025-01-31.'):
    assert part in text
  assert text.isascii()


def test_report_sample_with_backticks_stays_in_its_block(tmp_path):
  text = write_report(make_run(tmp_path)).read_text()
  assert '````\nTo be ```or``` not | to be\n````' in text


@pytest.mark.parametrize('steps', [1, 2])
def test_report_of_a_very_short_run_has_all_pictures(tmp_path, steps):
  write_report(make_run(tmp_path, steps=steps))
  assert len(list((tmp_path / 'report').iterdir())) == 4


def test_report_of_a_dense_model_without_evaluation_has_no_expert_pictures(tmp_path):
  write_report(make_run(tmp_path, layers=0, evals=False))
  assert sorted(p.name for p in (tmp_path / 'report').iterdir()) == ['loss.png', 'optim.png']


def test_report_of_an_unfinished_run_says_so(tmp_path):
  make_run(tmp_path)
  (tmp_path / 'summary.json').unlink()
  (tmp_path / 'config.json').unlink()
  assert '40 so far; the run has not finished' in write_report(tmp_path).read_text()


def test_report_of_a_run_that_only_saw_nan_is_still_written(tmp_path):
  write_report(make_run(tmp_path, steps=1, evals=False, bad_step=1))
  assert 'Training loss is never finite' in (tmp_path / 'report.md').read_text()


def test_report_removes_the_pictures_of_an_earlier_run(tmp_path):
  write_report(make_run(tmp_path))
  (tmp_path / 'metrics.jsonl').unlink()
  write_report(make_run(tmp_path, layers=0))
  assert not (tmp_path / 'report' / 'load.png').exists()


@pytest.mark.parametrize(
  'value, text',
  [
    (0, '0'),
    (7, '7'),
    (999, '999'),
    (0.5, '0.50'),
    (999.7, '1.00k'),
    (12_345, '12.3k'),
    (999_499, '999k'),
    (999_500, '1.00M'),
    (1_234_567, '1.23M'),
    (671e9, '671G'),
    (float('nan'), 'nan'),
  ],
)
def test_count_has_three_digits_and_a_unit(value, text):
  assert human.count(value) == text


@pytest.mark.parametrize(
  'seconds, text',
  [
    (0.04, '0.0s'),
    (9.94, '9.9s'),
    (9.96, '10s'),
    (59.6, '1m00s'),
    (80, '1m20s'),
    (3599.7, '1h00m'),
    (90_000, '1d01h'),
    (float('inf'), '--'),
  ],
)
def test_duration_has_its_two_largest_units(seconds, text):
  assert human.duration(seconds) == text


@pytest.mark.parametrize(
  'num_bytes, text',
  [
    (0, '0 B'),
    (1023, '1023 B'),
    (1024, '1.0 KiB'),
    (3_435_973_837, '3.2 GiB'),
    (2**60, '1048576.0 TiB'),
  ],
)
def test_size_has_binary_units(num_bytes, text):
  assert human.size(num_bytes) == text


def test_report_shows_what_evaluations_recorded_of_the_routing(tmp_path):
  make_run(tmp_path)
  config = to_dict(RunConfig()) | {'data': {'domains': {'code': {}, 'plays': {}}}}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  own_LGE = np.tile(np.kron(np.eye(2), np.full((1, 4), 50.0)), (2, 1, 1))
  for step in (0, 20, 40):
    chosen_LTK = np.full((2, 6, 2), [0, 1 + (step > 0)])
    Routing(own_LGE, np.eye(8)[None].repeat(2, 0), chosen_LTK).save(tmp_path, step)
  text = write_report(tmp_path).read_text()
  assert 'A choice of expert tells 1.00 to 1.00 of the 1.00 bits of its domain' in text
  assert 'Half of the final choices of experts are made by step 20 of 40' in text
  for name in ('specialisation', 'saturation'):
    assert matplotlib.image.imread(tmp_path / 'report' / f'{name}.png').shape[1] == 1200
