"""A workdir has one writer and one config, and says so in one line."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.train import workdir as workdir_module
from moe_jax.train.workdir import Workdir, WorkdirError, atomic_write_text

CONFIG = {'steps': 100, 'mesh': {'data': 1, 'expert': 1}, 'model': {'d_model': 64, 'sizes': (1, 2)}}
MAY_CHANGE = ('steps', 'mesh.*')

# holds the workdir until it is killed, without the seconds that starting JAX's devices takes
HOLDER = """
import sys
from moe_jax.train.workdir import Workdir
workdir = Workdir.open(sys.argv[1], {'steps': 1}, may_change=())
print('held', flush=True)
sys.stdin.read()
"""


def opened(path, config=CONFIG):
  return Workdir.open(path, config, may_change=MAY_CHANGE)


def changed(**fields):
  return CONFIG | fields


def test_first_run_makes_the_folder_and_writes_its_config(tmp_path):
  with opened(tmp_path / 'runs' / 'a') as workdir:
    assert workdir.read_config() == json.loads(json.dumps(CONFIG))
    names = (workdir.checkpoints, workdir.metrics, workdir.tensorboard, workdir.report)
    assert [p.name for p in names] == ['checkpoints', 'metrics.jsonl', 'tb', 'report.md']
  assert list(json.loads(workdir.config.read_text())) == ['steps', 'mesh', 'model']


def test_same_config_again_leaves_the_file_alone(tmp_path):
  with opened(tmp_path) as workdir:
    before = workdir.config.stat()
  with opened(tmp_path):
    assert workdir.config.stat() == before


def test_field_that_may_change_is_rewritten(tmp_path):
  opened(tmp_path).close()
  with opened(tmp_path, changed(steps=200, mesh={'data': 2, 'expert': 4})) as workdir:
    config = workdir.read_config()
  assert (config['steps'], config['mesh']['expert']) == (200, 4)


def test_other_fields_are_refused_with_the_difference(tmp_path):
  opened(tmp_path).close()
  before = (tmp_path / 'config.json').read_bytes()
  other = changed(steps=200, model={'d_model': 128, 'sizes': [1, 2], 'rope': 1.5})
  with pytest.raises(WorkdirError) as raised:
    opened(tmp_path, other)
  assert str(raised.value) == (
    f'workdir={tmp_path} was made with another config: model.d_model: 64 -> 128; '
    'model.rope: (absent) -> 1.5. Set these back or choose another --workdir.'
  )
  assert (tmp_path / 'config.json').read_bytes() == before
  opened(tmp_path).close()  # the refusal let the lock go


@pytest.mark.parametrize('text', ['', '{"steps": 1', '[]', '\x00\xff'], ids=repr)
def test_damaged_config_is_refused(tmp_path, text):
  (tmp_path / 'config.json').write_bytes(text.encode('latin-1'))
  with pytest.raises(WorkdirError, match=r'config\.json is damaged: it is not a JSON object'):
    opened(tmp_path)


def test_reader_of_a_folder_without_a_run_is_told(tmp_path):
  with pytest.raises(WorkdirError, match=r'has no config\.json: no run was made there'):
    Workdir(tmp_path).read_config()


@pytest.mark.parametrize('below', ['', 'deeper'], ids=['the path', 'a parent'])
def test_file_in_the_way_is_named(tmp_path, below):
  path = tmp_path / 'file'
  path.touch()
  with pytest.raises(WorkdirError, match=r'cannot be used: (it is not a folder|Not a directory)'):
    opened(path / below)


@pytest.mark.parametrize('number', [errno.EROFS, errno.EACCES, errno.ENOSPC], ids=os.strerror)
def test_unwritable_folder_is_one_line(tmp_path, monkeypatch, number):
  def refuse(*_, **__):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(Path, 'mkdir', refuse)
  with pytest.raises(WorkdirError) as raised:
    opened(tmp_path)
  assert str(raised.value) == (
    f'workdir={tmp_path} cannot be used: {os.strerror(number)}. '
    'Make it writable or choose another --workdir.'
  )


def test_lock_keeps_another_process_out_until_it_dies(tmp_path):
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLDER, tmp_path],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(WorkdirError) as raised:
      opened(tmp_path)
    assert re.fullmatch(
      rf'workdir={tmp_path} is in use by process {holder.pid} on host \S+\. '
      r'Wait for it or choose another --workdir\.',
      str(raised.value),
    )
    holder.kill()
    holder.wait()
    with opened(tmp_path, {'steps': 1}):
      assert f'process {os.getpid()} ' in (tmp_path / '.lock').read_text()
  finally:
    holder.kill()
    holder.communicate()


def test_atomic_write_that_fails_keeps_the_old_text(tmp_path, monkeypatch):
  path = tmp_path / 'report.md'
  atomic_write_text(path, 'old')

  def full(_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(workdir_module.os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    atomic_write_text(path, 'new')
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]
