"""From the bytes of a file in a common format to the documents in it."""

import fnmatch
import gzip
import html.parser
import io
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence

Extractor = Callable[[bytes], Iterable[str]]


def plain(raw: bytes) -> Iterator[str]:
  yield raw.decode('utf-8', 'replace')


class _PageText(html.parser.HTMLParser):
  """Collects the running text of a page: block elements break lines, navigation and scripts are
  left out."""

  SKIPPED = frozenset(['script', 'style', 'nav', 'head', 'footer', 'svg'])
  BLOCKS = frozenset(
    ['p', 'div', 'section', 'blockquote', 'pre', 'br', 'ul', 'ol', 'li', 'dt', 'dd', 'table', 'tr']
  ).union(f'h{level}' for level in range(1, 6))

  def __init__(self):
    super().__init__()
    self.parts: list[str] = []
    self._skipped, self._preformatted = 0, 0

  def handle_starttag(self, tag, attrs):
    self._skipped += tag in self.SKIPPED
    self._preformatted += tag == 'pre'
    if tag in self.BLOCKS:
      self.parts.append('\n')

  def handle_endtag(self, tag):
    self._skipped = max(0, self._skipped - (tag in self.SKIPPED))
    self._preformatted = max(0, self._preformatted - (tag == 'pre'))
    if tag in self.BLOCKS:
      self.parts.append('\n')

  def handle_data(self, data):
    if not self._skipped:
      self.parts.append(data if self._preformatted else re.sub(r'\s+', ' ', data))


def web_page(raw: bytes) -> Iterator[str]:
  page = _PageText()
  page.feed(raw.decode('utf-8', 'replace'))
  text = re.sub(r'[ \t]*\n[ \t]*\n\s*', '\n\n', ''.join(page.parts))
  yield re.sub(r'\n[ \t]+(?=\S)', '\n', text).strip()


def dictionary(raw: bytes) -> Iterator[str]:
  """A dictd .dict.dz (which is gzip), cut into documents of about 8000 characters."""
  entries, size = [], 0
  for entry in re.split(r'\n(?=\S)', gzip.decompress(raw).decode('utf-8', 'replace')):
    entries.append(entry)
    size += len(entry)
    if size > 8000:
      yield '\n'.join(entries)
      entries, size = [], 0
  if entries:
    yield '\n'.join(entries)


def manual_page(raw: bytes) -> Iterator[str]:
  """A gzipped roff page: titles and emphasis keep their words, other requests go."""
  text = gzip.decompress(raw).decode('utf-8', 'replace')
  titles = r'^\.(SH|SS|B|I|BR|IR|TP|IP|BI|RB|RI)\b[ \t]*"?([^"\n]*)"?'
  text = re.sub(titles, r'\2', text, flags=re.M)
  text = re.sub(r'^(\.\\"|\'\\"|\.).*$', '', text, flags=re.M)
  text = re.sub(r'\\f(\[[A-Z]*\]|[BIRPC][A-Z]?)', '', text)
  for escape, meaning in (('\\-', '-'), ('\\(bu', '*'), ('\\&', ''), ('\\e', '\\')):
    text = text.replace(escape, meaning)
  text = re.sub(r'\\\(..', '', text)
  yield re.sub(r'\n{3,}', '\n\n', text).strip()


def translations(raw: bytes) -> Iterator[str]:
  """A gettext .po file: the translated strings that differ from their originals, a line each."""
  found, field, message = [], None, {'id': '', 'str': ''}
  for line in [*raw.decode('utf-8', 'replace').splitlines(), '']:
    if line.startswith('msgid '):
      field, message, line = 'id', {'id': '', 'str': ''}, line[6:]
    elif re.match(r'msgstr(\[\d\])? ', line):
      field, line = 'str', line.split(' ', 1)[1]
    elif not line.startswith('"'):
      original, translated = message['id'], message['str']
      if field == 'str' and original and translated and translated != original:
        found.append(translated)
      field = None
      continue
    if field and line.startswith('"'):
      message[field] += line[1:-1].replace('\\n', '\n').replace('\\"', '"')
  yield '\n'.join(found)


def tar_xz(patterns: Sequence[str], max_bytes: int) -> Extractor:
  """Files of a nested .tar.xz that match, in its own order, until they exceed `max_bytes`."""

  def extract(raw: bytes) -> Iterator[str]:
    size = 0
    with tarfile.open(fileobj=io.BytesIO(raw), mode='r:xz') as archive:
      for info in archive:
        if info.isfile() and any(fnmatch.fnmatch(info.name, pattern) for pattern in patterns):
          file = archive.extractfile(info)
          assert file is not None
          data = file.read()
          size += len(data)
          if size > max_bytes:
            return
          yield data.decode('utf-8', 'replace')

  return extract


def nested_zip(patterns: Sequence[str], max_bytes: int) -> Extractor:
  """Files of a nested .zip that match, ordered by name, until they exceed `max_bytes`."""

  def extract(raw: bytes) -> Iterator[str]:
    size = 0
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
      for name in sorted(archive.namelist()):
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
          data = archive.read(name)
          size += len(data)
          if size > max_bytes:
            return
          yield data.decode('utf-8', 'replace')

  return extract
