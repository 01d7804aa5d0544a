"""What the program cannot do it says in one line, with exit code 2, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from experiments import generate
from experiments import run as experiments_run
from moe_jax.train.workdir import Workdir
from tests.run.program import CONFIG, DEPRECATED

pytestmark = pytest.mark.filterwarnings(DEPRECATED)


@pytest.fixture
def refuse(capfd, tmp_path):
  """Runs the program in this process and returns the one line that it refuses with.

  Here are 8 devices, so that the default mesh is (8, 1, 1).
  """

  def run(*arguments, config=CONFIG, main=experiments_run.main):
    kept = sorted(tmp_path.rglob('*'))
    capfd.readouterr()
    code = main(['program', *([f'--config={config}'] if config else []), *arguments])
    out, err = capfd.readouterr()
    assert code == 2
    assert out == ''
    [line] = err.splitlines()
    assert line.startswith('error: ')
    assert line.endswith(('.', '?')), 'whole sentences'
    assert sorted(tmp_path.rglob('*')) == kept, 'nothing is created'
    return line

  return run


@pytest.mark.parametrize(
  ('override', 'parts'),
  [
    ('optim.lr_peek=1e-3', ['config.optim.lr_peek', 'Did you mean lr_peak?']),
    ('model.moe.topk=2', ['config.model.moe.topk', 'Did you mean top_k?']),
    ('stepz=3', ['config.stepz', 'Did you mean steps?']),
    ('steps.more=3', ['config.steps is a value', "'more'"]),
    ('steps=1e4', ['steps', '1e4']),
    ('steps=many', ['steps', 'many']),
    ('optim.lr_peak=fast', ['lr_peak', 'fast']),
    ('log.tensorboard=perhaps', ['tensorboard', 'perhaps']),
    ('steps=0', ['config.steps=0', 'must be positive']),
    ('precision=float8', ["config.precision='float8'", 'float32, bfloat16']),
    ('precision=fp8_block', ['model.d_model=16', 'multiple of 128', "precision='bfloat16'"]),
    ('precision_overrides.linear_dgrad=e4m2', ["'e4m2'", 'bfloat16, e4m3, e5m2']),
    ('balance=los_free', ["'los_free' is not a balancing idea", 'Did you mean loss_free?']),
    ('model.moe.top_k=9', ['model.moe.top_k=9', 'num_experts=8', 'Lower top_k']),
    ('model.moe.num_groups=3', ['model.moe.num_groups=3', 'must divide num_experts=8']),
    ('model.mla.d_rope=5', ['model.mla.d_rope=5', 'must be even']),
    ('microbatches=3', ['microbatches=3', 'must divide data.batch_size=8']),
    ('mesh.model=8', ['model.mla.num_heads=2', 'mesh.model=8']),
    ('mesh.expert=3', ['mesh=', '8, the number of devices']),
    ('data.batch_size=12', ['data.batch_size=12', 'multiple of 8']),
    ('model.d_model=20', ['model.d_model=20', 'mesh.data=8']),
    ('model.vocab_size=256', ['model.vocab_size=256', '257 ids', "data.tokenizer='bytes'"]),
    ('data.tokenizer=words', ["data.tokenizer='words'", 'bytes, deepseek']),
    ('data.domains.plays.source=/no/such', ["data.domains.plays.source='/no/such'", 'not exist']),
    ('data.domains.plays.weight=0.0', ['weight=0.0', 'must be positive']),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
def test_a_wrong_override_is_one_line_that_names_it(refuse, tmp_path, override, parts):
  line = refuse(f'--config.{override}', f'--workdir={tmp_path / "run"}')
  for part in parts:
    assert part in line


def test_a_tracker_that_is_not_installed_is_one_line(refuse, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  line = refuse('--config.log.tracker=wandb', f'--workdir={tmp_path / "run"}')
  assert "log.tracker='wandb' is not installed. Run `uv sync --extra tracking`" in line


def test_experts_must_divide_over_their_devices(refuse, tmp_path):
  experts = ['--config.mesh.expert=8', '--config.model.moe.num_experts=12']
  line = refuse(*experts, f'--workdir={tmp_path / "run"}')
  assert 'model.moe.num_experts=12 must be a multiple of mesh.expert=8' in line


@pytest.mark.parametrize(
  ('content', 'parts'),
  [
    ({}, ['is a folder without .jsonl/.txt/.md files']),
    ({'a.txt': ''}, ['holds 0 different document(s)']),
    ({'a.jsonl': '{"text": "one"}\n{"txet": "two"}\n'}, ['a.jsonl:2', '"text"']),
    ({'a.txt': b'\xff\xfe'}, ['a.txt', 'not UTF-8 at byte 0']),
  ],
  ids=['no_files', 'no_text', 'no_field', 'no_utf8'],
)
def test_an_unusable_corpus_is_one_line_that_names_it(refuse, tmp_path, content, parts):
  corpus = tmp_path / 'corpus'
  corpus.mkdir()
  for name, text in content.items():
    (corpus / name).write_bytes(text.encode() if isinstance(text, str) else text)
  source = f'--config.data.domains.plays.source={corpus}'
  line = refuse(source, f'--workdir={tmp_path / "run"}')
  assert 'data.domains.plays.source=' in line
  for part in parts:
    assert part in line


def test_a_missing_config_file_is_one_line_with_the_nearest(refuse, tmp_path):
  line = refuse(f'--workdir={tmp_path / "run"}', config='experiments/configs/quikstart.py')
  assert "there is no file 'experiments/configs/quikstart.py'" in line
  assert 'Did you mean experiments/configs/quickstart.py?' in line


def test_a_config_file_that_fails_is_one_line(refuse, tmp_path):
  file = tmp_path / 'broken.py'
  for text, part in (('def get_config(:', 'is not Python'), ('1 / 0', 'division by zero')):
    file.write_text(text)
    line = refuse(f'--workdir={tmp_path / "run"}', config=file)
    assert str(file) in line
    assert part in line


@pytest.mark.parametrize(
  ('config', 'part'),
  [
    ('small.py:bites', "'bites' is not an argument of this config. Did you mean bytes?"),
    ('quickstart.py:tiny', 'it takes no argument. Leave out :tiny.'),
  ],
)
def test_an_argument_that_a_config_does_not_know_is_one_line(refuse, tmp_path, config, part):
  line = refuse(f'--workdir={tmp_path / "run"}', config=f'experiments/configs/{config}')
  assert part in line


def test_missing_flags_are_one_line(refuse, tmp_path):
  assert '--workdir is missing' in refuse()
  assert '--config is missing' in refuse(f'--workdir={tmp_path / "run"}', config=None)


def test_an_unknown_flag_is_one_line(refuse, tmp_path):
  assert '--wrkdir is not a flag. Did you mean workdir?' in refuse(f'--wrkdir={tmp_path / "run"}')
  assert "'extra' is not understood" in refuse('extra', f'--workdir={tmp_path / "run"}')


@pytest.mark.parametrize('value', ['here', 'localhost:1234,2', 'localhost:1234,two,0'])
def test_an_unreadable_distributed_flag_is_one_line(refuse, tmp_path, value):
  line = refuse(f'--distributed={value}', f'--workdir={tmp_path / "run"}')
  assert 'HOST:PORT,NUM_PROCESSES,PROCESS_ID' in line


def test_a_file_in_place_of_the_workdir_is_one_line(refuse, tmp_path, program):
  (tmp_path / 'run').write_text('mine')
  cache = f'--config.data.cache_dir={program.tokens}'
  line = refuse(cache, f'--workdir={tmp_path / "run"}')
  assert 'it is not a folder' in line
  assert (tmp_path / 'run').read_text() == 'mine'


def test_a_workdir_in_use_is_refused_with_its_user(refuse, tmp_path, program):
  with Workdir.open(tmp_path / 'run', {}, may_change=()):
    cache = f'--config.data.cache_dir={program.tokens}'
    line = refuse(cache, f'--workdir={tmp_path / "run"}')
  assert f'is in use by process {os.getpid()} on host' in line


def test_generating_from_no_run_is_one_line(refuse, tmp_path):
  arguments = [f'--workdir={tmp_path}', '--prompt=To be']
  line = refuse(*arguments, config=None, main=generate.main)
  assert 'has no config.json: no run was made there' in line


@pytest.mark.parametrize('flag', ['--top_p=0', '--top_p=1.5', '--temperature=-1', '--num_tokens=x'])
def test_generating_with_a_wrong_flag_is_one_line(refuse, tmp_path, flag):
  line = refuse(f'--workdir={tmp_path}', flag, config=None, main=generate.main)
  assert flag.partition('=')[0].strip('-') in line


def test_speculating_at_a_temperature_is_one_line(refuse, tmp_path):
  line = refuse(f'--workdir={tmp_path}', '--speculative', config=None, main=generate.main)
  assert '--speculative' in line and line.endswith('Add --temperature=0.')


@pytest.mark.slow
def test_speculating_without_modules_is_one_line(refuse, straight):
  arguments = [f'--workdir={straight}', '--speculative', '--temperature=0']
  line = refuse(*arguments, config=None, main=generate.main)
  assert 'model.mtp.num_modules=0: nothing drafts' in line


@pytest.mark.slow
def test_another_config_is_refused_showing_the_difference(program, straight, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(straight, workdir)
  result = program.run(workdir, '--config.optim.lr_peak=0.5', '--config.seed=1')
  assert result.code == 2
  [line] = result.err.splitlines()
  assert line.startswith('error: workdir=')
  assert 'optim.lr_peak: 0.003 -> 0.5' in line
  assert 'seed: 0 -> 1' in line
  assert json.loads((workdir / 'config.json').read_text())['seed'] == 0


@pytest.mark.slow
def test_a_program_that_refuses_exits_with_two_before_any_file(program, tmp_path):
  result = program.run(tmp_path / 'run', '--config.model.moe.top_k=99')
  assert (result.code, result.out) == (2, '')
  [line] = result.err.splitlines()
  assert line.startswith('error: model.moe.top_k=99')
  assert not (tmp_path / 'run').exists()


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 1 MB of its own; only root can mount one."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(folder)]
  try:
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
  except FileNotFoundError:
    mounted = False
  if not mounted:
    pytest.skip('only root can mount a small disk')
  yield folder
  subprocess.run(['umount', str(folder)], check=True)


@pytest.mark.slow
def test_a_read_only_workdir_is_one_line(program, small_disk):
  subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
  result = program.run(small_disk / 'run')
  assert (result.code, result.out) == (2, '')
  [line] = result.err.splitlines()
  assert line.startswith('error: ')
  assert 'Read-only file system' in line
  assert list(small_disk.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
  program, straight, small_disk
):
  result = program.run(small_disk / 'run', '--config.checkpoint.keep=12')
  assert result.code == 2
  [line] = result.err.splitlines()
  assert line.startswith('error: ')
  assert 'No space left on device' in line
  assert list(small_disk.rglob('*.partial')) == []

  subprocess.run(['mount', '-o', 'remount,size=16m', str(small_disk)], check=True)
  result = program.run(small_disk / 'run', '--config.checkpoint.keep=12')
  assert result.code == 0, result.err


@pytest.mark.slow
def test_a_cluster_that_is_none_is_one_line(program, tmp_path):
  result = program.run(tmp_path / 'run', '--distributed=auto')
  assert (result.code, result.out) == (2, '')
  [line] = result.err.splitlines()
  assert line.startswith('error: ')
  assert not (tmp_path / 'run').exists()
