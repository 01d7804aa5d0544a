"""The comparison of precision policies: what its runs are given."""

import itertools
import json
import lzma

import jax
import numpy as np
import pytest

from experiments.balance.tokens import DOMAINS, Rows
from experiments.compare_precision import RUNS, main, text, with_overrides
from experiments.configs import precision
from moe_jax import config_io
from moe_jax import sharding as sh
from tests.run.program import DEPRECATED


def tiny():
  return precision.get_config('tiny').to_dict()


def test_every_run_is_a_config_that_exists():
  for overrides in RUNS.values():
    config_io.build(with_overrides(tiny(), overrides))


def test_overrides_leave_the_values_as_they_were():
  values = tiny()
  with_overrides(values, {'model.moe.top_k': 1})
  assert values['model']['moe']['top_k'] == 2


def test_text_of_a_file_of_tokens_comes_in_the_order_of_its_rows(tmp_path):
  cfg, path = config_io.build(tiny()), tmp_path / 'tokens.xz'
  length = cfg.data.sequence_length
  arrays = {'eos_id': np.array(0)}
  for i, name in enumerate(DOMAINS):
    arrays[f'{name}.train.tokens'] = np.arange(1, 20 * length, dtype=np.uint16) + i
    arrays[f'{name}.train.offsets'] = np.array([0, 20 * length - 1])
  with lzma.open(path, 'wb') as file:
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
  rows = Rows(path, 'train', length=length)
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), text(cfg, path) as stream:
    for i, batch in enumerate(itertools.islice(stream, 3)):
      want = rows.batch(i, cfg.data.batch_size)
      np.testing.assert_array_equal(batch['tokens'], want['tokens'])


@pytest.mark.filterwarnings(DEPRECATED)
def test_runs_that_are_whole_are_summarized_without_training(tmp_path):
  for i, (name, overrides) in enumerate(RUNS.items()):
    loss = [4.0 + 0.01 * i] * tiny()['steps']
    (tmp_path / f'{name}.json').write_text(json.dumps({'overrides': overrides, 'loss': loss}))
  config = '--config=experiments/configs/precision.py:tiny'
  assert main(['compare_precision', config, f'--workdir={tmp_path}']) == 0
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['fp8_block']['relative_to_bfloat16'] == pytest.approx(0.005)
  assert (tmp_path / 'loss.png').exists()
