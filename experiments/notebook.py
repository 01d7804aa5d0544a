"""What the notebooks share: they run programs as a reader would type them, and show pictures.

Runs go to runs/notebooks (or the folder that MOE_JAX_NOTEBOOK_RUNS names), where a run that is
there already is not made again.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_jax.analysis import style

ROOT = Path(__file__).parents[1]


def runs() -> Path:
  """The folder of the notebooks' runs."""
  return Path(os.environ.get('MOE_JAX_NOTEBOOK_RUNS', ROOT / 'runs' / 'notebooks')).absolute()


def program(module: str, *flags: str, show_lines: int = 12) -> None:
  """Runs `python -m MODULE FLAGS` in the repository's root, and prints the end of what it says.

  Raises:
    RuntimeError: it failed; the error has all that it said.
  """
  print(f'$ python -m {module} {shlex.join(_without_root(flag) for flag in flags)}')
  # whatever a terminal would get, a notebook gets plain lines
  ended = subprocess.run(
    [sys.executable, '-m', module, *flags],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=os.environ | {'TERM': 'dumb'},
    check=False,
  )
  lines = _without_root(ended.stdout).rstrip().splitlines()
  if ended.returncode:
    raise RuntimeError(f'exit code {ended.returncode}\n' + '\n'.join(lines))
  print(*(['...'] if len(lines) > show_lines else []), *lines[-show_lines:], sep='\n')


def _without_root(text: str) -> str:
  """Paths as from the repository's root: the same on every machine."""
  return text.replace(f'{runs()}/', 'runs/notebooks/').replace(f'{ROOT}/', '')


def show(figure: Any) -> Any:
  """A matplotlib Figure as a picture in the notebook, drawn in the project's style."""
  from IPython.display import Image

  if figure is None:
    raise ValueError('there is nothing to draw: the run has not recorded these metrics.')
  title = ' '.join(figure.get_suptitle().split())
  return Image(style.png(figure), width=800, alt=title)
