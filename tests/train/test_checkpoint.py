"""Checkpoints come back bit for bit, on any mesh, or say which file is at fault."""

import contextlib
import json
import logging
import os
import re
import resource
import shutil
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

from moe_jax.train import digests
from moe_jax.train.checkpoint import Checkpointer, CheckpointError


class Optimizer(NamedTuple):
  count: jax.Array
  moment: dict[str, jax.Array]
  nothing: tuple = ()


def make_mesh(shape):
  devices = jax.devices()[: np.prod(shape)]
  axes = ('data', 'expert', 'model')
  return jax.make_mesh(shape, axes, axis_types=(AxisType.Explicit,) * 3, devices=devices)


def create(key):
  """One leaf of each kind that a training state has."""
  draw = lambda shape, spec: jax.random.normal(key, shape, out_sharding=spec)
  w_EDF = draw((8, 16, 8), P('expert', 'data', 'model'))
  return {
    'params': {'up_EDF': w_EDF, 'head_DV': draw((16, 24), P('data', 'model')).astype(jnp.bfloat16)},
    'opt': Optimizer(jnp.int32(7), {'up_EDF': w_EDF * w_EDF}),
    'keys': [key, jax.random.split(key, (3,))],
    'flags': jnp.array([True, False]),
    'odd': draw((5, 3), P()).astype(jnp.float8_e4m3fn),
    'special': jnp.array([jnp.nan, -0.0, jnp.inf], jnp.float32),
    'empty_LD': jnp.zeros((0, 4)),
  }


def bits(tree):
  raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return [(str(x.dtype), x.shape, np.asarray(raw(x)).tobytes()) for x in jax.tree.leaves(tree)]


def small(step):
  return {'params': {'w': jnp.full((64, 8), step, jnp.float32)}, 'step': jnp.int32(step)}


SMALL = jax.eval_shape(small, 0)


@pytest.fixture
def checkpointer(tmp_path):
  checkpointer = Checkpointer(tmp_path / 'checkpoints', keep=2)
  yield checkpointer
  with contextlib.suppress(CheckpointError):  # provoked by the test
    checkpointer.close()


def save(checkpointer, *steps, **kwargs):
  for step in steps:
    checkpointer.save(step, small(step), **kwargs)
  checkpointer.wait()


@pytest.fixture
def folder(checkpointer, tmp_path):
  """Two good steps, 10 and 20."""
  save(checkpointer, 10, 20)
  return tmp_path / 'checkpoints'


def files(step_folder):
  return sorted(p for p in step_folder.rglob('*') if p.is_file())


@pytest.mark.parametrize('shape', [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 1)], ids=str)
def test_state_saved_on_222_comes_back_bit_for_bit_on_mesh(checkpointer, shape):
  mesh = make_mesh((2, 2, 2))
  with jax.set_mesh(mesh):
    state = jax.jit(create)(jax.random.key(0))
    checkpointer.save(50, state, meta={'position': 1234, 'weights': [0.1, 0.2]})
    checkpointer.wait()
  with jax.set_mesh(make_mesh(shape)):
    target = jax.eval_shape(create, jax.random.key(0))
    restored = checkpointer.restore(target)
    fresh = jax.jit(create)(jax.random.key(0))
  assert (restored.step, restored.meta) == (50, {'position': 1234, 'weights': [0.1, 0.2]})
  assert jax.tree.structure(restored.state) == jax.tree.structure(state)
  assert bits(restored.state) == bits(state)
  placed = jax.tree.map(
    lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), restored.state, fresh
  )
  assert all(jax.tree.leaves(placed))


def test_concrete_shardings_need_no_mesh_in_context(checkpointer):
  with jax.set_mesh(make_mesh((2, 2, 2))):
    state = jax.jit(create)(jax.random.key(0))
  checkpointer.save(1, state)
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  assert bits(checkpointer.restore(jax.tree.map(struct, state)).state) == bits(state)


def test_abstract_shardings_outside_a_mesh_are_refused(checkpointer):
  with jax.set_mesh(make_mesh((2, 2, 2))):
    checkpointer.save(1, jax.jit(create)(jax.random.key(0)))
    target = jax.eval_shape(create, jax.random.key(0))
  with pytest.raises(ValueError, match=r'Call restore under jax.set_mesh'):
    checkpointer.restore(target)


def test_state_may_be_donated_once_save_returns(checkpointer):
  increment = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  state = increment({'w': jnp.zeros((1000, 1000))})
  for step in (1, 2):
    checkpointer.save(step, state)
    for _ in range(10):
      state = increment(state)
  target = {'w': jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
  assert np.unique(checkpointer.restore(target, step=1).state['w']) == [1]
  assert np.unique(checkpointer.restore(target, step=2).state['w']) == [11]


def test_nothing_saved_restores_none_and_makes_no_folder(checkpointer, tmp_path):
  assert checkpointer.restore(SMALL) is None
  assert checkpointer.steps() == []
  assert not (tmp_path / 'checkpoints').exists()


def test_newest_steps_are_kept(checkpointer):
  save(checkpointer, 10, 20, 30, 40)
  assert checkpointer.steps() == [30, 40]


def test_newest_step_is_restored_or_the_named_one(checkpointer, folder):
  assert int(checkpointer.restore(SMALL).state['step']) == 20
  assert int(checkpointer.restore(SMALL, step=10).state['step']) == 10


def test_absent_step_is_refused_naming_those_there(checkpointer, folder):
  with pytest.raises(CheckpointError, match=r'no checkpoint of step 15.*there: 10, 20'):
    checkpointer.restore(SMALL, step=15)


def test_step_saved_again_replaces_itself_and_later_ones(checkpointer, folder):
  checkpointer.save(10, small(11))
  checkpointer.wait()
  assert checkpointer.steps() == [10]
  assert int(checkpointer.restore(SMALL).state['step']) == 11


def test_stale_partial_folders_are_ignored_then_removed_by_a_save(checkpointer, folder):
  for name in ('step_00000030.partial', 'step_00000010.old.partial'):
    shutil.copytree(folder / 'step_00000010', folder / name)
  assert checkpointer.steps() == [10, 20]
  assert checkpointer.restore(SMALL).step == 20
  save(checkpointer, 30)
  assert sorted(p.name for p in folder.iterdir()) == ['step_00000020', 'step_00000030']


def test_flipped_bit_in_any_file_is_found_named_and_passed_over(checkpointer, folder, caplog):
  paths = files(folder / 'step_00000020')
  assert len(paths) >= 8
  for path in paths:
    whole = path.read_bytes()
    for place in {0, len(whole) // 2, len(whole) - 1}:
      broken = bytearray(whole)
      broken[place] ^= 1 << (place % 8)
      path.write_bytes(broken)
      caplog.clear()
      restored = checkpointer.restore(SMALL)
      assert (restored.step, int(restored.state['step'])) == (10, 10)
      (record,) = caplog.records
      name = path.relative_to(folder / 'step_00000020').as_posix()
      assert record.levelno == logging.WARNING and name in record.getMessage()
    path.write_bytes(whole)
  assert checkpointer.restore(SMALL).step == 20


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'empty', 'extra'])
def test_changed_file_is_named(checkpointer, folder, damage):
  for path in files(folder / 'step_00000020'):
    whole, victim = path.read_bytes(), path
    if damage == 'missing':
      path.unlink()
    elif damage == 'extra':
      victim = path.with_name('extra')
      victim.touch()
    else:
      path.write_bytes(whole[:-1] if damage == 'truncated' else b'')
    name = victim.relative_to(folder / 'step_00000020').as_posix()
    with pytest.raises(
      CheckpointError, match=rf'step 20: {re.escape(name)}: .*Choose another step'
    ):
      checkpointer.restore(SMALL, step=20)
    victim.unlink(missing_ok=True)
    path.write_bytes(whole)


def test_digests_edited_by_hand_are_refused(checkpointer, folder):
  path = folder / 'step_00000020' / 'digests.json'
  path.write_text(json.dumps(json.loads(path.read_text())))
  with pytest.raises(CheckpointError, match=r'digests\.json: damaged'):
    checkpointer.restore(SMALL, step=20)


def test_no_good_step_lists_what_is_wrong_with_each(checkpointer, folder):
  (folder / 'step_00000010' / 'digests.json').unlink()
  files(folder / 'step_00000020' / 'state')[0].unlink()
  with pytest.raises(
    CheckpointError, match=r'step 20: state/.*missing \| step 10: digests.json: missing'
  ):
    checkpointer.restore(SMALL)


def test_run_that_fell_back_replaces_the_damaged_step(checkpointer, folder):
  (folder / 'step_00000020' / 'digests.json').unlink()
  assert checkpointer.restore(SMALL).step == 10
  save(checkpointer, 15)
  assert checkpointer.steps() == [10, 15]


@pytest.mark.parametrize(
  ('target', 'message'),
  [
    ({'w': ((64, 9), jnp.float32)}, r'params.w should be float32\[64,9\] and is float32\[64,8\]'),
    ({'w': ((64, 8), jnp.bfloat16)}, r'params.w should be bfloat16\[64,8\] and is float32\[64,8\]'),
    ({}, r'params.w should be absent and is float32\[64,8\]'),
    (
      {'w': ((64, 8), jnp.float32), 'b': ((8,), jnp.float32)},
      r'params.b should be float32\[8\] and is absent',
    ),
  ],
  ids=['shape', 'dtype', 'leaf only in the checkpoint', 'leaf only in the target'],
)
def test_misfit_names_leaf_expected_and_found(checkpointer, folder, target, message):
  params = {name: jax.ShapeDtypeStruct(*leaf) for name, leaf in target.items()}
  with pytest.raises(CheckpointError, match=message):
    checkpointer.restore({'params': params, 'step': SMALL['step']})


def test_leaf_that_is_no_array_is_refused(checkpointer):
  with pytest.raises(ValueError, match=r'state.opt.count is a int. Make it a jax.Array'):
    checkpointer.save(1, {'opt': {'count': 3}})


def test_meta_is_as_it_was_when_save_was_called(checkpointer):
  meta = {'position': 1}
  checkpointer.save(1, small(1), meta=meta)
  meta['position'] = 2
  assert checkpointer.restore(SMALL).meta == {'position': 1}


def test_meta_that_is_not_json_is_refused_before_anything_is_written(checkpointer, tmp_path):
  with pytest.raises(TypeError, match=r'int64 is not JSON serializable'):
    checkpointer.save(1, small(1), meta={'position': np.int64(1)})
  assert not (tmp_path / 'checkpoints').exists()


def test_leaves_of_one_name_are_refused(checkpointer):
  with pytest.raises(ValueError, match=r'state.a.b names two leaves'):
    checkpointer.save(1, {'a': {'b': jnp.ones(1)}, 'a.b': jnp.ones(1)})


def test_failed_write_surfaces_once_and_the_next_save_works(checkpointer, folder, caplog, capfd):
  """The system refuses files above 10 kB; incompressible values make a larger one."""
  noise = {'params': {'w': jax.random.normal(jax.random.key(0), (64, 800))}, 'step': jnp.int32(30)}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
  try:
    checkpointer.save(30, noise)
    with pytest.raises(CheckpointError) as raised:
      checkpointer.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert re.fullmatch(
    rf'cannot save step 30 in {folder}: File too large \([\d,]+ MB left there\)\. Free some.*',
    str(raised.value),
  )
  assert sorted(p.name for p in folder.iterdir()) == ['step_00000010', 'step_00000020']
  assert not caplog.records and capfd.readouterr() == ('', '')
  save(checkpointer, 30)
  assert checkpointer.restore(SMALL).step == 30


def test_error_in_the_run_still_completes_its_last_save(tmp_path):
  with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path, keep=2) as checkpointer:
    checkpointer.save(1, small(1))
    raise ZeroDivisionError
  assert checkpointer.steps() == [1]


def test_failed_digest_surfaces_at_the_next_save(checkpointer, folder, monkeypatch):
  def full(_):
    raise OSError(28, os.strerror(28))

  monkeypatch.setattr(os, 'fsync', full)
  checkpointer.save(30, small(30))
  with pytest.raises(CheckpointError, match=r'cannot save step 30 .*No space left on device'):
    checkpointer.save(40, small(40))
  assert checkpointer.steps() == [10, 20]
  assert not list(folder.glob('*.partial'))


def test_failure_inside_orbax_leaves_nothing_behind(checkpointer, folder, monkeypatch):
  def refuse(*_, **__):
    raise RuntimeError('no such\nluck')

  monkeypatch.setattr(checkpointer._orbax, 'save', refuse)
  with pytest.raises(CheckpointError, match=r'cannot save step 30 .*: RuntimeError: no such \('):
    checkpointer.save(30, small(30))
  assert sorted(p.name for p in folder.iterdir()) == ['step_00000010', 'step_00000020']


def test_folder_that_cannot_be_made_fails_in_save(tmp_path):
  (tmp_path / 'file').touch()
  checkpointer = Checkpointer(tmp_path / 'file' / 'checkpoints', keep=2)
  with checkpointer, pytest.raises(CheckpointError, match=r'step 1 in .*Not a directory'):
    checkpointer.save(1, small(1))


def test_save_returns_before_the_step_is_complete(checkpointer, monkeypatch):
  save(checkpointer, 1)
  let_it_end, seal = threading.Event(), digests.seal
  monkeypatch.setattr(digests, 'seal', lambda *args: (let_it_end.wait(10), seal(*args)))
  checkpointer.save(2, small(2))
  assert checkpointer.steps() == [1]
  let_it_end.set()
  checkpointer.wait()
  assert checkpointer.steps() == [1, 2]
