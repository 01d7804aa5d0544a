"""Runs the program on tiny.py, in processes of its own, and looks at what it leaves behind."""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.flags import load
from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.config import RunConfig
from moe_jax.train import loop
from moe_jax.train.checkpoint import Checkpointer
from moe_jax.train.metrics import Metrics, read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name('tiny.py')
ONE_DEVICE = (1, 1, 1)
SAMPLE = '--config.sample.num_tokens=4'
# runs on several devices are compared by tolerance, so they may do with less compiling
COMPILE_LESS = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
# ml_collections 1.1.0 loads config files by it
DEPRECATED = 'ignore:the load_module:DeprecationWarning'


class Result(NamedTuple):
  code: int
  out: str
  err: str


class Program:
  """Starts runs that share one folder of compiled functions and one of tokens."""

  def __init__(self, folder: Path):
    self._compiled, self.tokens = folder / 'compiled', folder / 'tokens'

  def command(self, workdir: Path, *args: str) -> list[str]:
    """What a user types. Warnings are errors, as in the tests."""
    start = [sys.executable, '-W', 'error', '-W', DEPRECATED, '-m', 'experiments.run']
    own = [f'--config={CONFIG}', f'--workdir={workdir}', f'--config.data.cache_dir={self.tokens}']
    return [*start, *own, *args]

  def env(self, *, devices: int = 1, reuse: bool = True, keep: bool = True) -> dict[str, str]:
    """Args: reuse what other runs compiled; keep what this one compiles."""
    flags = f'--xla_force_host_platform_device_count={devices}'
    if devices > 1:
      flags = f'{flags} {COMPILE_LESS}'
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
    if reuse:
      env |= {
        'JAX_COMPILATION_CACHE_DIR': str(self._compiled),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0' if keep else '1e9',
      }
    return env

  def start(self, workdir: Path, *args: str, **env: Any) -> subprocess.Popen:
    """Starts the program; further arguments are those of `env`."""
    return subprocess.Popen(
      self.command(workdir, *args),
      cwd=ROOT,
      env=self.env(**env),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, workdir: Path, *args: str, **env: Any) -> Result:
    with self.start(workdir, *args, **env) as process:
      try:
        out, err = process.communicate(timeout=300)
      finally:
        process.kill()
    return Result(process.returncode, out, err)

  def config(self, **overrides: Any) -> RunConfig:
    """The same config for use in this process, with dotted fields replaced."""
    c = load(str(CONFIG))
    c.update_from_flattened_dict({'data.cache_dir': str(self.tokens), **overrides})
    return config_io.build(c.to_dict())


@functools.cache
def target(mesh_shape: tuple[int, int, int]) -> Any:
  with jax.set_mesh(sh.make_mesh(mesh_shape)):
    return loop.state_target(config_io.build(load(str(CONFIG)).to_dict()))


def restore(workdir: Path, *, step: int | None = None, mesh_shape=ONE_DEVICE) -> Any:
  """The newest state of a workdir, or that of one step."""
  with jax.set_mesh(sh.make_mesh(mesh_shape)):
    checkpoints = Checkpointer(workdir / 'checkpoints', keep=2)
    with checkpoints:
      restored = checkpoints.restore(target(mesh_shape), step=step)
  assert restored is not None
  return restored.state


def bits(state: Any) -> dict[str, tuple[str, bytes]]:
  """Every number of a state, by name, as it lies in memory."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  host = ((jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves)
  return {name: (str(a.dtype), a.tobytes()) for name, a in host}


def lines(workdir: Path) -> list[dict[str, Any]]:
  """What a run recorded, apart from events and from what depends on the clock."""
  metrics: Metrics = read_metrics(workdir)
  assert metrics.unreadable == 0
  clock = ('time/', 'train/tokens_per_s')
  return [{n: v for n, v in row.items() if not n.startswith(clock)} for row in metrics.rows]


def checkpoint_steps(workdir: Path) -> list[int]:
  found = (workdir / 'checkpoints').glob('step_*')
  return sorted(int(p.name.removeprefix('step_')) for p in found if not p.suffix)


def wait_for(claim: Callable[[], Any], process: subprocess.Popen, *, timeout_s: float = 60) -> Any:
  """Polls until `claim()` is true; fails where the process ends or takes too long."""
  until = time.monotonic() + timeout_s
  while time.monotonic() < until:
    if value := claim():
      return value
    assert process.poll() is None, f'ended early: {process.communicate()}'
    time.sleep(0.01)
  raise AssertionError(f'nothing after {timeout_s} s')


def last_step(workdir: Path) -> int:
  """The step of the last line that is in metrics.jsonl, 0 without one."""
  if not (workdir / 'metrics.jsonl').exists():
    return 0
  rows = read_metrics(workdir).rows
  return rows[-1]['step'] if rows else 0
