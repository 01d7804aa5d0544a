"""Every notebook runs from a clean clone, and what is kept is what its source would leave."""

import importlib.util
import time
from pathlib import Path

import pytest

pytest.importorskip('jupytext')
pytest.importorskip('nbclient')

TOOL = Path(__file__).parents[2] / 'tools' / 'build_notebooks.py'


def load_tool():
  spec = importlib.util.spec_from_file_location('build_notebooks', TOOL)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


tool = load_tool()
SOURCES = tool.sources([])
# jupyter warns of what it will change
IGNORED = ('ignore::DeprecationWarning', 'ignore::ResourceWarning', 'ignore::FutureWarning')


@pytest.mark.parametrize('source', SOURCES, ids=lambda path: path.stem)
def test_the_kept_notebook_is_that_of_its_source(source):
  assert tool.problems(source) == []


def test_a_notebook_that_differs_from_its_source_is_found(tmp_path):
  source = tmp_path / '01_x.py'
  text = SOURCES[0].read_text()
  kept = SOURCES[0].with_suffix('.ipynb').read_text()
  source.write_text(f'{text}\n# %%\nprint(1)\n')
  assert tool.problems(source) == ['01_x.ipynb is missing']
  source.with_suffix('.ipynb').write_text(kept)
  assert tool.problems(source) == ['01_x.ipynb has other cells than 01_x.py']


@pytest.fixture(scope='session')
def shared_runs(tmp_path_factory):
  """One folder for all: notebook 3 reads the run of notebook 1."""
  return tmp_path_factory.mktemp('notebook_runs')


@pytest.mark.notebook
@pytest.mark.parametrize('source', SOURCES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings(*IGNORED)
def test_a_notebook_runs_to_its_end(source, shared_runs, monkeypatch, capsys):
  monkeypatch.setenv('MOE_JAX_NOTEBOOK_RUNS', str(shared_runs))
  # its readers have one CPU device, not the eight of these tests
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  started_s = time.monotonic()
  notebook = tool.execute(source)
  with capsys.disabled():
    print(f'\n{source.stem}: {time.monotonic() - started_s:.0f} s')
  pictures = [
    o for c in notebook.cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})
  ]
  assert pictures
