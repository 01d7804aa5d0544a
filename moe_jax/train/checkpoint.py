"""Checkpoints that are whole or absent: Orbax writes, digests are added, one rename makes a step.

The folder's protocol, which holds at every instant that a kill can hit:

  step_00000050.partial/state    Orbax writes here; never read, and removed by the next save
  step_00000050.partial/         Orbax is done: digests.json is computed and put on the disk
  step_00000050/                 exists if and only if all of the above is complete
  step_00000050.old.partial/     on its way out: renamed first, so no half step keeps its name

Only a save writes. Restoring does not, so another program may read the folder of a running one.

With several processes, all see the same folder and call save, wait, restore and close at the same
place; process 0 alone digests, renames and removes. Background threads meet only at Orbax's own
host barriers, never at a device collective, which would race with the training step.
"""

import json
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AbstractMesh, NamedSharding, Sharding, SingleDeviceSharding

from moe_jax.train import digests
from moe_jax.train.processes import from_first, raise_together

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written, or none can be read; one line with the place and the remedy."""


class Restored(NamedTuple):
  step: int
  state: Any
  meta: dict[str, Any]


class Checkpointer:
  """Saves and restores the steps of one run in one folder.

  Args:
    directory: made by the first save. On a file system that all processes share.
    keep: how many of the newest steps stay.
  """

  def __init__(self, directory: Path, *, keep: int):
    self._directory = Path(directory).absolute()
    self._keep = keep
    # Orbax logs a failed write three times with its traceback, and hands us the exception too
    logging.getLogger('absl').addFilter(_not_orbax)
    self._orbax = ocp.AsyncCheckpointer(
      ocp.StandardCheckpointHandler(),
      # in the foreground an unwritable folder is found by `save` itself
      async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
    )
    self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix='checkpoint')
    self._pending: Future[None] | None = None

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, kind: object, *_: object) -> None:
    if kind is None:
      self.close()
    else:  # perhaps on this process alone: it must not wait for the others in a collective
      self._end()

  def steps(self) -> list[int]:
    """The complete steps, oldest first."""
    if not self._directory.is_dir():
      return []
    names = (re.fullmatch(r'step_(\d{8,})', p.name) for p in self._directory.iterdir())
    return sorted(int(match[1]) for match in names if match)

  def save(self, step: int, state: Any, *, meta: dict[str, Any] | None = None) -> None:
    """Copies the state to the host and returns; the rest happens in the background.

    The arrays may be donated as soon as this returns. A step saved again replaces the old one.
    Later steps, left when a run went back past them, are removed: the folder holds one history, and
    its newest step is the last saved.

    Args:
      step: number of finished optimizer steps.
      state: pytree of jax.Array, typed keys included; with several processes, global arrays.
      meta: JSON values to come back with the state.

    Raises:
      CheckpointError: this save or the one before it could not be written. Earlier
        steps are untouched.
      ValueError: a leaf is not a jax.Array, or two leaves have the same name.
    """
    self.wait()
    leaves = _named_leaves(state)
    for name, x in leaves.items():
      if not isinstance(x, jax.Array):
        raise ValueError(
          f'state.{name} is a {type(x).__name__}. Make it a jax.Array, or put it in meta.'
        )
    record = {
      'step': step,
      # a copy, because the caller's may move on before the background writes it
      'meta': json.loads(json.dumps(meta or {})),
      'leaves': {name: _describe(x) for name, x in leaves.items()},
      'keys': {name: jax.random.key_impl(x) for name, x in leaves.items() if _is_key(x)},
    }
    partial = self._path(step).with_suffix('.partial')
    error = None
    if jax.process_index() == 0:
      try:
        for stale in self._directory.glob('*.partial'):
          shutil.rmtree(stale)
        partial.mkdir(parents=True)
      except OSError as e:
        error = self._abandon(step, partial, e)
    raise_together(error, CheckpointError)
    try:
      # Orbax refuses arrays without elements; restore makes them again
      arrays = {name: _raw(x) for name, x in leaves.items() if x.size}
      self._orbax.save(partial / 'state', args=ocp.args.StandardSave(arrays))
    except Exception as e:
      raise self._abandon(step, partial, e) from e
    self._pending = self._pool.submit(self._commit, step, partial, record)

  def wait(self) -> None:
    """Returns when the last save is complete on the disk; raises its CheckpointError otherwise."""
    error = self._pending.exception() if self._pending else None
    self._pending = None
    assert error is None or isinstance(error, Exception)
    raise_together(error, CheckpointError)

  def close(self) -> None:
    """Waits for the last save, then ends the threads; raises as `wait` does."""
    try:
      self.wait()
    finally:
      self._end()

  def _end(self) -> None:
    self._pool.shutdown()
    self._orbax.close()

  def restore(self, target: Any, *, step: int | None = None) -> Restored | None:
    """Returns the newest step whose every byte is as written, or None where no step was ever saved.

    A damaged step is logged, with the files at fault, and the one before it is taken.

    Args:
      target: pytree of ShapeDtypeStruct, as from `jax.eval_shape`. A leaf without a sharding, or
        with one on an abstract mesh, goes to the mesh of `jax.set_mesh`. It need not be the mesh
        that the state was saved from.
      step: take this one and no other.

    Raises:
      CheckpointError: no step is whole, the named one is damaged or absent, or a leaf does not
        fit the target.
    """
    self.wait()
    error, found = None, -1
    if jax.process_index() == 0:
      try:
        found = self._newest_whole(step)
      except CheckpointError as e:
        error = e
    raise_together(error, CheckpointError)
    found = from_first(found)
    if found < 0:
      return None
    # process 0 has verified the files; here every process reads the record
    record = digests.read(self._path(found))
    leaves = _named_leaves(target)
    self._check_fit(found, record['leaves'], leaves)
    structs = {name: _raw_struct(x) for name, x in leaves.items()}
    arrays = self._orbax.restore(
      self._path(found) / 'state',
      args=ocp.args.StandardRestore({name: s for name, s in structs.items() if s.size}),
    )
    for name, s in structs.items():
      if not s.size:
        arrays[name] = jax.device_put(np.zeros(s.shape, s.dtype), s.sharding)
    for name, impl in record['keys'].items():
      arrays[name] = jax.random.wrap_key_data(arrays[name], impl=impl)
    state = [arrays[name] for name in leaves]
    return Restored(found, jax.tree.unflatten(jax.tree.structure(target), state), record['meta'])

  def newest(self) -> int | None:
    """The newest step whose every byte is as written, None where no step was ever saved.

    For one process; raises CheckpointError where no step is whole.
    """
    found = self._newest_whole(None)
    return None if found < 0 else found

  def read_leaf(self, step: int, name: str) -> np.ndarray:
    """One leaf of a whole step, on the host: for readers that want little of a large state.

    Args:
      name: its path in the state, such as 'params.head_DV'.
    """
    described = digests.read(self._path(step))['leaves'].get(name)
    if described is None:
      raise CheckpointError(f'checkpoint {self._path(step)} has no leaf {name}.')
    if 0 in described['shape']:
      return np.zeros(described['shape'], described['dtype'])
    one = ocp.args.PyTreeRestore(
      item={name: np.zeros(())},
      restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
      partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      return reader.restore(self._path(step) / 'state', args=one)[name]

  def _commit(self, step: int, partial: Path, record: dict[str, Any]) -> None:
    """Runs in the background on every process, up to the complete step and the pruning."""
    try:
      # on process 0 this returns after all processes have written
      self._orbax.wait_until_finished()
      if jax.process_index() != 0:
        return
      digests.seal(partial, record)
      if step in self.steps():
        self._remove(step)
      partial.rename(self._path(step))
      digests.sync_folder(self._directory)
      history = [s for s in self.steps() if s <= step]
      for other in set(self.steps()) - set(history[-self._keep :]):
        self._remove(other)
    except Exception as e:
      raise self._abandon(step, partial, e) from e

  def _newest_whole(self, step: int | None) -> int:
    """Returns the step to restore, -1 where there is none at all."""
    steps = self.steps()
    if step is not None and step not in steps:
      there = ', '.join(map(str, steps)) or 'none'
      raise CheckpointError(
        f'{self._directory} has no checkpoint of step {step}. Choose one of those there: {there}.'
      )
    problems = []
    for candidate in reversed(steps) if step is None else [step]:
      try:
        digests.check(self._path(candidate))
      except digests.DamageError as e:
        problems.append(f'step {candidate}: {e}')
        if step is None:
          _log.warning('checkpoint %s is damaged and passed over: %s', self._path(candidate), e)
      else:
        return candidate
    if not problems:
      return -1
    raise CheckpointError(
      f'no good checkpoint in {self._directory}: {" | ".join(problems)}. '
      + ('Choose another step.' if step is not None else 'Remove the folder to start again.')
    )

  def _check_fit(self, step: int, saved: dict[str, Any], leaves: dict[str, Any]) -> None:
    found = {name: _text(**leaf) for name, leaf in saved.items()}
    expected = {name: _text(**_describe(x)) for name, x in leaves.items()}
    names = [n for n in expected | found if expected.get(n) != found.get(n)]
    if names:
      name = names[0]
      raise CheckpointError(
        f'checkpoint {self._path(step)} does not fit: {name} should be '
        f'{expected.get(name, "absent")} and is {found.get(name, "absent")} there'
        f'{f" ({len(names) - 1} more leaves differ)" if len(names) > 1 else ""}. '
        'Restore with the config it was saved with, or choose another --workdir.'
      )

  def _path(self, step: int) -> Path:
    return self._directory / f'step_{step:08d}'

  def _remove(self, step: int) -> None:
    doomed = self._path(step).with_suffix('.old.partial')
    self._path(step).rename(doomed)
    shutil.rmtree(doomed)

  def _abandon(self, step: int, partial: Path, error: Exception) -> CheckpointError:
    """Removes what was written of a step; returns the error to raise."""
    # TensorStore's errors are ValueErrors with the number of the system's error in the text
    number = re.search(r"os_error_code='(\d+)'", str(error))
    code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
    reason = os.strerror(code) if code else f'{type(error).__name__}: {error}'.splitlines()[0]
    place = next(p for p in [self._directory, *self._directory.parents] if p.exists())
    room = shutil.disk_usage(place).free / 1e6
    if jax.process_index() == 0:
      shutil.rmtree(partial, ignore_errors=True)
    return CheckpointError(
      f'cannot save step {step} in {self._directory}: {reason} ({room:,.0f} MB left there). '
      'Free some space, make it writable, or choose another --workdir. Earlier steps are whole.'
    )


def _named_leaves(tree: Any) -> dict[str, Any]:
  """{'params.w': leaf, ...} in tree order; flat, so that no container type reaches Orbax."""
  named = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='.') or 'state'
    if name in named:
      raise ValueError(f'state.{name} names two leaves. Take the dot out of a key.')
    named[name] = leaf
  return named


def _is_key(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw(x: jax.Array) -> jax.Array:
  return jax.random.key_data(x) if _is_key(x) else x


def _raw_struct(x: Any) -> jax.ShapeDtypeStruct:
  raw = jax.eval_shape(_raw, jax.ShapeDtypeStruct(x.shape, x.dtype))
  return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=_sharding(x))


def _describe(x: Any) -> dict[str, Any]:
  return {'shape': list(x.shape), 'dtype': str(x.dtype)}


def _text(shape: list[int], dtype: str) -> str:
  return f'{dtype}[{",".join(map(str, shape))}]'


def _sharding(x: Any) -> Sharding:
  """Where to put a leaf; `jax.eval_shape` knows only the abstract mesh, and none for constants."""
  sharding, mesh = x.sharding, jax.sharding.get_mesh()
  if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
    if mesh.empty:
      raise ValueError('the target has an abstract mesh. Call restore under jax.set_mesh(mesh).')
    return NamedSharding(mesh, sharding.spec)
  if sharding is not None:
    return sharding
  return SingleDeviceSharding(jax.devices()[0]) if mesh.empty else NamedSharding(mesh, jax.P())


def _not_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in Path(record.pathname).parts
