"""What the memory prediction counts, and when."""

import functools

import jax
import pytest

from experiments.bench.suites.train_step import tiny
from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.precision import compute_copy, policy_of
from moe_jax.train import cost
from moe_jax.train.state import create


@pytest.fixture(autouse=True)
def on_one_device():
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    yield


def abstract(**model):
  c = tiny()
  c.precision = model.pop('precision', 'bfloat16')
  c.model.update(model)
  cfg = config_io.build(c.to_dict())
  return cfg, jax.eval_shape(functools.partial(create, cfg), jax.random.key(0))


def test_unrolled_layers_need_no_room_for_gradients_beside_what_is_kept():
  (scanned, state), (unrolled, same) = abstract(), abstract(unroll_layers=True)
  copy = jax.eval_shape(functools.partial(compute_copy, policy_of(scanned)), state.params)
  gradients = cost.bytes_per_device(copy)
  saved = cost.predicted_bytes(scanned, state) - cost.predicted_bytes(unrolled, same)
  assert 0 < saved <= gradients


def test_weights_quantised_once_are_counted_in_place_of_rounded_ones():
  sizes = {}
  for precision in ('bfloat16', 'fp8_block'):
    cfg, state = abstract(precision=precision)
    copy = jax.eval_shape(functools.partial(compute_copy, policy_of(cfg)), state.params)
    sizes[precision] = cost._operand_bytes(cfg, state, copy)
  # two copies of a byte each with float32 scales of 128 x 128, for one of two bytes
  assert sizes['bfloat16'] <= sizes['fp8_block'] < 1.3 * sizes['bfloat16']
