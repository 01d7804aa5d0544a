import sys
from pathlib import Path

import pytest

from sweeps import rows
from sweeps import run as sweeps_run
from tests.run.program import CONFIG

FAKE = str(Path(__file__).with_name('fake_run.py'))


@pytest.fixture
def sweep(tmp_path, monkeypatch, capfd):
  """Runs a sweep's text in this process, with a stand-in for experiments.run; (code, out, err)."""
  monkeypatch.setattr(rows, 'PROGRAM', ('-S', FAKE))

  def run(text: str, *arguments: str, workdir: Path = tmp_path / 'sweep'):
    file = tmp_path / 'sweep.py'
    file.write_text(f'from sweeps import space\nCONFIG = {str(CONFIG)!r}\n{text}')
    capfd.readouterr()
    code = sweeps_run.main(['run', f'--sweep={file}', f'--workdir={workdir}', *arguments])
    out, err = capfd.readouterr()
    return code, out, err

  pytest.importorskip('pyarrow')
  pytest.importorskip('pandas')
  assert sys.executable
  return run
