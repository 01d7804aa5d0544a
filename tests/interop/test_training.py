"""Training starts from what was imported, and what was trained is exported."""

import functools

import jax
import numpy as np
import pytest
from checkpoints import V3, contents, make

from moe_jax import config_io, interop
from moe_jax import sharding as sh
from moe_jax.config import RunConfig
from moe_jax.interop.api import open_for
from moe_jax.interop.export_hf import export_hf
from moe_jax.interop.import_hf import import_hf
from moe_jax.interop.variables import materialize, one_device
from moe_jax.train import loop
from moe_jax.train.checkpoint import Checkpointer
from moe_jax.train.state import create
from moe_jax.train.workdir import Workdir


class Quiet:
  def __init__(self):
    self.notes = []

  def update(self, step, values): ...

  def note(self, text):
    self.notes.append(text)


def started(monkeypatch, cfg, screen, initial):
  """The state that a run starts from, without its data."""
  run = object.__new__(loop._Run)
  run.cfg, run.screen, run.initial = cfg, screen, initial
  monkeypatch.setattr(run, 'report_evaluation', lambda *_: None, raising=False)

  class Nowhere:
    def save(self, step, state): ...

  run.checkpoints = Nowhere()
  return run.start()


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['imported folder', 'published folder'])
def test_a_run_starts_from_an(kind, tmp_path, monkeypatch):
  folder = make(tmp_path / 'a', V3)
  if kind == 'imported folder':
    import_hf(folder, tmp_path / 'ours')
    source = tmp_path / 'ours'
  else:
    source = folder
  cfg, variables = interop.load(folder)
  screen = Quiet()
  with jax.set_mesh(one_device()):
    run = RunConfig(model=cfg, init_from=str(source))
    initial = functools.partial(materialize, open_for(cfg, source))
    state = started(monkeypatch, run, screen, initial)
    fresh = jax.eval_shape(functools.partial(create, run), jax.random.key(0))
  assert jax.tree.structure(state) == jax.tree.structure(fresh)
  found = {'params': state.params, 'router': state.router}
  jax.tree.map(np.testing.assert_array_equal, found, variables)
  assert screen.notes == [f'parameters from {source}']


def test_a_run_does_not_start_from_another_model(tmp_path):
  folder = make(tmp_path / 'a', V3)
  cfg, _ = interop.load(folder)
  values = config_io.to_dict(cfg)
  other = config_io.build(values | {'d_ff': 41, 'init_std': 0.5}, type(cfg))
  with pytest.raises(interop.InteropError, match=r'model\.d_ff=41 \(there 40\)\.$'):
    open_for(other, folder)


def test_fields_that_only_training_reads_may_differ(tmp_path):
  folder = make(tmp_path / 'a', V3)
  values = config_io.to_dict(interop.load(folder)[0])
  full = values['full'] | {'num_heads': 77}
  other = config_io.build(
    values | {'init_std': 0.5, 'remat': 'full', 'full': full}, type(interop.load(folder)[0])
  )
  open_for(other, folder)


@pytest.mark.slow
def test_newest_whole_checkpoint_of_a_workdir_is_exported(tmp_path):
  folder = make(tmp_path / 'a', V3)
  cfg, variables = interop.load(folder)
  run = RunConfig(model=cfg)
  with (
    jax.set_mesh(sh.make_mesh((1, 1, 1))),
    Workdir.open(tmp_path / 'run', config_io.to_dict(run), may_change=()) as workdir,
    Checkpointer(workdir.checkpoints, keep=3) as checkpoints,
  ):
    state = jax.jit(functools.partial(create, run))(jax.random.key(0))
    checkpoints.save(1, state)
    state = state._replace(params=variables['params'], router=variables['router'])
    checkpoints.save(2, state)
    later = jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p))(state.params)
    checkpoints.save(3, state._replace(params=later))
    checkpoints.wait()
  damaged = next(p for p in (workdir.checkpoints / 'step_00000003').rglob('d/*') if p.is_file())
  damaged.write_bytes(b'x' + damaged.read_bytes()[1:])
  export_hf(tmp_path / 'run', tmp_path / 'out')
  assert contents(tmp_path / 'out') == contents(folder)


def test_workdir_without_a_checkpoint_is_refused(tmp_path):
  (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(interop.InteropError, match=r'config\.json'):
    export_hf(tmp_path / 'run', tmp_path / 'out')
