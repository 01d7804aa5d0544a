"""Digests of every file in a folder, kept beside them: Orbax returns a flipped bit without a word.

`digests.json` also carries a record of the caller's and a digest of itself. Its text is canonical,
so that a change of any byte, white space included, is found.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FILE = 'digests.json'


class DamageError(ValueError):
  """A folder is not what was written; the text names each file and what is wrong with it."""


def seal(folder: Path, record: dict[str, Any]) -> None:
  """Writes digests.json for the files now in `folder`; all of it is on the disk on return.

  Args:
    folder: nobody else may be writing there.
    record: JSON values to keep with the digests; `files` and `sha256` are taken.
  """
  names = _names(folder)
  # an integer key becomes a string on the way through JSON; the text must be that of what is read
  record = json.loads(json.dumps(record | {'files': _digests(folder, names, sync=True)}))
  with open(folder / FILE, 'w') as file:
    file.write(_canonical(record))
    file.flush()
    os.fsync(file.fileno())
  for path in [folder, *(p for p in folder.rglob('*') if p.is_dir())]:
    sync_folder(path)


def read(folder: Path) -> dict[str, Any]:
  """Returns the record that `seal` kept; raises DamageError unless digests.json itself is whole."""
  record, whole = {}, False
  try:
    text = (folder / FILE).read_bytes().decode('ascii')
    record = json.loads(text)
    record.pop('sha256')
    whole = _canonical(record) == text
  except FileNotFoundError:
    raise DamageError(f'{FILE}: missing') from None
  except (OSError, ValueError, AttributeError, KeyError):
    pass
  if not whole:
    raise DamageError(f'{FILE}: damaged')
  return record


def check(folder: Path) -> None:
  """Raises DamageError unless every byte is as `seal` found it and no file was added."""
  expected, names = read(folder)['files'], _names(folder)
  problems = [f'{name}: missing' for name in expected if name not in names]
  problems += [f'{name}: was not written with it' for name in names if name not in expected]
  present = [name for name in expected if name in names]
  for name, found in _digests(folder, present, sync=False).items():
    if found['bytes'] != expected[name]['bytes']:
      problems.append(f'{name}: {found["bytes"]} bytes, not {expected[name]["bytes"]}')
    elif found != expected[name]:
      problems.append(f'{name}: sha256 differs')
  if problems:
    raise DamageError('; '.join(problems))


def sync_folder(folder: Path) -> None:
  """Makes the names in `folder` survive a power cut; fsync of a file does not cover its name."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _names(folder: Path) -> list[str]:
  paths = (p for p in folder.rglob('*') if not p.is_dir())
  return sorted(name for p in paths if (name := p.relative_to(folder).as_posix()) != FILE)


def _digests(folder: Path, names: list[str], *, sync: bool) -> dict[str, dict[str, Any]]:
  def digest(name: str) -> dict[str, Any]:
    try:
      with open(folder / name, 'rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
        if sync:
          os.fsync(file.fileno())
        return {'bytes': file.tell(), 'sha256': sha256}
    except OSError as error:
      if sync:
        raise
      # a bad sector, or a folder that another process is pruning: damage, not a crash
      return {'bytes': -1, 'sha256': str(error)}

  # hashing and reading both release the interpreter lock
  with ThreadPoolExecutor(max_workers=8) as pool:
    return dict(zip(names, pool.map(digest, names), strict=True))


def _canonical(record: dict[str, Any]) -> str:
  dump = lambda value: json.dumps(value, indent=1, sort_keys=True)
  return dump(record | {'sha256': hashlib.sha256(dump(record).encode()).hexdigest()})
