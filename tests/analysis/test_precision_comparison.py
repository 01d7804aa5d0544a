"""What the comparison of precisions says about losses that are made up."""

import numpy as np

from moe_jax.analysis import precision as compare

N = 400
BASE = 5 * np.exp(-np.arange(N) / 300) + 1


def test_the_last_quarter_is_compared_in_relative_terms():
  summary = compare.summarize({'bfloat16': BASE, 'fp8_block': BASE * 1.002})
  assert abs(summary['fp8_block']['relative_to_bfloat16'] - 0.002) < 1e-9
  assert summary['bfloat16']['relative_to_bfloat16'] == 0


def test_a_spike_is_counted_where_it_is():
  noisy = BASE + np.random.default_rng(0).normal(size=N) * 0.02
  spiked = noisy.copy()
  spiked[250] += 2
  assert compare.spikes(noisy) == 0
  assert compare.spikes(spiked) == 1


def test_the_picture_states_the_difference():
  losses = {'bfloat16': BASE, 'twin': BASE * 1.0005, 'fp8_block': BASE * 1.001}
  figure = compare.draw(losses, compare.summarize(losses))
  assert 'fp8_block +0.10%' in figure.get_suptitle()
