"""Packages in, one .jsonl file a domain and a manifest out."""

import contextlib
import fnmatch
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moe_jax.data.corpus_build.cleaning import Cleaner
from moe_jax.data.corpus_build.containers import members, unreadable
from moe_jax.data.corpus_build.sources import LICENCES, Source


class _DomainFile:
  """<domain>.jsonl while it grows, with its digest and sizes."""

  def __init__(self, path: pathlib.Path):
    self._file = path.open('wb')
    self._sha256 = hashlib.sha256()
    self.num_documents, self.num_bytes = 0, 0

  def add(self, record: Mapping[str, str]) -> int:
    """Returns the bytes of the record's text."""
    line = (json.dumps(record, ensure_ascii=False) + '\n').encode()
    self._file.write(line)
    self._sha256.update(line)
    size = len(record['text'].encode())
    self.num_documents += 1
    self.num_bytes += size
    return size

  def close(self) -> None:
    self._file.close()

  def summary(self) -> dict[str, Any]:
    return {
      'documents': self.num_documents,
      'bytes': self.num_bytes,
      'sha256': self._sha256.hexdigest(),
    }


def assemble(
  files: Mapping[str, pathlib.Path],
  sources: Sequence[Source],
  out: pathlib.Path,
  *,
  max_bytes: float,
  report: Callable[[str], None],
) -> dict[str, Any]:
  """Writes out/<domain>.jsonl and out/manifest.json; returns the manifest.

  A line is {"text", "domain", "source", "path"}. The same files and sources give the same bytes.

  Args:
    files: of each package that may be used; sources of other packages are left out.
    out: an existing, empty folder.
    max_bytes: of text in a domain; the document that crosses it is its last.

  Raises:
    ValueError: a package is damaged.
  """
  cleaner, domains, uses = Cleaner(), {}, []
  with contextlib.ExitStack() as opened:
    for source in _grouped(source for source in sources if source.package in files):
      path = files[source.package]
      num_documents, num_bytes = 0, 0
      for inner, text in _documents(path, source):
        domain = domains.get(source.domain)
        if domain and domain.num_bytes > max_bytes:
          break
        text = cleaner.clean(source.domain, text)
        if text is None:
          continue
        if domain is None:
          domain = domains[source.domain] = _DomainFile(out / f'{source.domain}.jsonl')
          opened.callback(domain.close)
        name = re.split(r'_|-[0-9]', path.name)[0]
        record = {'text': text, 'domain': source.domain, 'source': name, 'path': inner}
        num_bytes += domain.add(record)
        num_documents += 1
      use = {'domain': source.domain, 'package': source.package, 'files': source.files}
      uses.append(use | {'documents': num_documents, 'bytes': num_bytes})
      report(f'{source.domain:9} {path.name:56.56} {num_documents:6} {num_bytes / 1e6:8.2f} MB')
  manifest = {
    'domains': {name: domain.summary() for name, domain in sorted(domains.items())},
    'packages': {
      package: {
        'file': path.name,
        'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
        'licence': LICENCES.get(package, 'unknown'),
      }
      for package, path in files.items()
    },
    'sources': uses,
  }
  (out / 'manifest.json').write_text(json.dumps(manifest, indent=1) + '\n', encoding='utf-8')
  return manifest


def _grouped(sources: Iterator[Source]) -> list[Source]:
  """Puts the sources of one package together, where the first of them stands."""
  by_package: dict[str, list[Source]] = {}
  for source in sources:
    by_package.setdefault(source.package, []).append(source)
  return [source for group in by_package.values() for source in group]


def _documents(package: pathlib.Path, source: Source) -> Iterator[tuple[str, str]]:
  """Yields (path inside the package, document)."""
  for inner, read in members(package):
    if fnmatch.fnmatch(inner, source.files):
      try:
        for text in source.extract(read()):
          yield inner, text
      except Exception as e:  # each format has errors of its own
        raise unreadable(f'{inner} in {package}', e) from e
