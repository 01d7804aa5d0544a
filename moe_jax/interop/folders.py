"""Folders that are whole or absent, and the files that go along with a checkpoint."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_jax.interop.errors import InteropError

# tokenizer and generation settings: not ours to understand, but needed to serve the model
_COMPANIONS = (
  'generation_config.json',
  'special_tokens_map.json',
  'tokenizer.json',
  'tokenizer_config.json',
)
ORIGIN = 'published_config.json'


def check_free(folder: Path) -> None:
  """Refuses a place where something is already."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InteropError(f'{folder} is not empty. Choose a new folder, or remove it.')


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
  """A folder to write in, which gets its name when all is written, and vanishes on an error."""
  check_free(folder)
  partial = folder.with_name(f'{folder.name}.partial')
  if partial.exists():
    shutil.rmtree(partial)
  partial.mkdir(parents=True)
  try:
    yield partial
    if folder.exists():
      folder.rmdir()
    partial.rename(folder)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def copy_companions(source: Path, target: Path) -> None:
  for name in _COMPANIONS:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)
