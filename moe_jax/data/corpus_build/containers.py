"""Files inside a wheel, a tarball or a Debian package, read in place."""

import gzip
import io
import lzma
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import IO

from moe_jax.data.errors import one_line

Member = tuple[str, Callable[[], bytes]]


def unreadable(what: object, error: Exception) -> ValueError:
  return ValueError(f'{what} cannot be read ({one_line(error)}). Download its package again.')


def members(package: pathlib.Path) -> Iterator[Member]:
  """Yields (path inside, a function that reads it), ordered by path; nothing is unpacked to disk.

  Raises:
    ValueError: the package is damaged or packed in an unknown way.
  """
  try:
    if package.suffix in ('.whl', '.zip'):
      yield from _zip_members(package)
    elif package.suffix == '.deb':
      yield from _tar_members(io.BytesIO(_debian_data(package.read_bytes())))
    else:
      with package.open('rb') as file:
        yield from _tar_members(file)
  except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, EOFError, OSError) as e:
    raise unreadable(package, e) from e


def _zip_members(package: pathlib.Path) -> Iterator[Member]:
  with zipfile.ZipFile(package) as archive:
    for name in sorted(archive.namelist()):
      if not name.endswith('/'):
        yield name, lambda name=name: archive.read(name)


def _tar_members(file: IO[bytes]) -> Iterator[Member]:
  with tarfile.open(fileobj=file) as archive:
    infos = sorted((info for info in archive if info.isfile()), key=lambda info: info.name)
    for info in infos:
      yield info.name.lstrip('./'), lambda info=info: _read(archive, info)


def _read(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
  file = archive.extractfile(info)
  assert file is not None, 'only regular files are listed'
  return file.read()


def _debian_data(raw: bytes) -> bytes:
  """The tar file of a .deb, which is an ar archive: an 8-byte magic, then 60-byte headers."""
  at = 8
  while at + 60 <= len(raw):
    name = raw[at : at + 16].decode('ascii', 'replace').strip().rstrip('/')
    size = int(raw[at + 48 : at + 58])
    data = raw[at + 60 : at + 60 + size]
    at += 60 + size + size % 2
    if name == 'data.tar.xz':
      return lzma.decompress(data)
    if name == 'data.tar.gz':
      return gzip.decompress(data)
    if name == 'data.tar':
      return data
  raise tarfile.ReadError('no data.tar, data.tar.gz or data.tar.xz in it')
