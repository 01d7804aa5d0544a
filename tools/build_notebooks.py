"""Executes the notebooks, keeps them with their pictures: python tools/build_notebooks.py [NAME]

notebooks/NAME.py is the source, in jupytext's percent format; NAME.ipynb is made from it, for
readers on a forge. With --check nothing is executed: it fails where the two have different cells,
or where a notebook was kept with an error or without being executed.
"""

import pathlib
import sys
import time

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parents[1] / 'notebooks'
CELL_TIMEOUT_S = 1800


def sources(names: list[str]) -> list[pathlib.Path]:
  found = sorted(FOLDER.glob('[0-9][0-9]_*.py'))
  return [path for path in found if not names or any(name in path.stem for name in names)]


def execute(source: pathlib.Path) -> nbformat.NotebookNode:
  """Runs all cells in a fresh kernel; raises where one fails."""
  notebook = jupytext.read(source)
  resources = {'metadata': {'path': str(FOLDER)}}
  NotebookClient(notebook, timeout=CELL_TIMEOUT_S, resources=resources).execute()
  return notebook


def keep(notebook: nbformat.NotebookNode, source: pathlib.Path) -> None:
  """Writes the .ipynb without what changes from run to run and says nothing."""
  for number, cell in enumerate(notebook.cells):
    cell.id = f'cell-{number}'
    cell.metadata = {}
  notebook.metadata = {
    'kernelspec': notebook.metadata['kernelspec'],
    'language_info': {'name': 'python'},
  }
  nbformat.write(notebook, source.with_suffix('.ipynb'))


def problems(source: pathlib.Path) -> list[str]:
  """How source.ipynb is not what executing `source` would leave."""
  kept = source.with_suffix('.ipynb')
  if not kept.exists():
    return [f'{kept.name} is missing']
  ours, theirs = jupytext.read(source).cells, nbformat.read(kept, as_version=4).cells
  found = []
  if [(c.cell_type, c.source) for c in ours] != [(c.cell_type, c.source) for c in theirs]:
    found.append(f'{kept.name} has other cells than {source.name}')
  code = [c for c in theirs if c.cell_type == 'code']
  if not all(c.execution_count for c in code):
    found.append(f'{kept.name} was not executed to its end')
  if any(o.output_type == 'error' for c in code for o in c.outputs):
    found.append(f'{kept.name} was kept with an error')
  return found


def main() -> int:
  names = [a for a in sys.argv[1:] if a != '--check']
  if '--check' in sys.argv:
    found = [p for source in sources(names) for p in problems(source)]
    for problem in found:
      print(f'{problem}: python tools/build_notebooks.py')
    return bool(found)
  for source in sources(names):
    started_s = time.monotonic()
    keep(execute(source), source)
    print(f'{source.stem}: {time.monotonic() - started_s:.0f} s')
  return 0


if __name__ == '__main__':
  sys.exit(main())
