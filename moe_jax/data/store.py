"""Tokenized documents, kept on disk so that a text is tokenized once."""

# N tokens, D documents

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Sequence

import numpy as np

from moe_jax.data.errors import one_line
from moe_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)
FORMAT = 1  # part of the key: raise it when the meaning of the files changes


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """Documents end to end, each followed by the tokenizer's eos.

  Attributes:
    tokens_N: uint16 or uint32; may be mapped from a file.
    offsets_D1: int64 [D + 1]; document d is tokens_N[offsets_D1[d]:offsets_D1[d + 1]], its eos
      included.
  """

  tokens_N: np.ndarray
  offsets_D1: np.ndarray


def tokenized(texts: Sequence[str], tokenizer: Tokenizer, *, cache_dir: str) -> TokenStore:
  """Returns the tokens of `texts`, from the cache where it has them.

  An entry is named by a digest of the texts and the tokenizer and holds a checksum; a damaged one
  is made again. An entry appears under its name complete or not at all, so processes may race.
  Where the cache cannot be written the tokens stay in memory, and one line is logged.

  Args:
    cache_dir: empty means moe_jax under $XDG_CACHE_HOME, by default ~/.cache.
  """
  root = pathlib.Path(cache_dir).expanduser() if cache_dir else _user_cache() / 'moe_jax'
  entry = root / _key(texts, tokenizer)
  store = _load(entry)
  if store is None:
    made = _tokenize(texts, tokenizer)
    try:
      _save(entry, made)
    except OSError as e:
      log.warning('tokenized text stays in memory: %s cannot be written (%s)', root, e.strerror)
      return made
    store = _load(entry)  # a map of the file: pages that are not in use cost no memory
    return made if store is None else store
  return store


def _user_cache() -> pathlib.Path:
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')


def _key(texts: Sequence[str], tokenizer: Tokenizer) -> str:
  digest = hashlib.blake2b(f'{FORMAT} {tokenizer.digest}'.encode(), digest_size=16)
  for text in texts:
    raw = text.encode()
    digest.update(len(raw).to_bytes(8))
    digest.update(raw)
  return f'tokens-{digest.hexdigest()}'


def _tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> TokenStore:
  dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
  parts = []
  for start in range(0, len(texts), 256):  # bounds the memory that Python's lists of ids take
    for ids in tokenizer.encode_batch(texts[start : start + 256]):
      parts.append(np.array([*ids, tokenizer.eos_id], dtype))
  offsets_D1 = np.zeros(len(parts) + 1, np.int64)
  np.cumsum([part.size for part in parts], out=offsets_D1[1:])
  return TokenStore(np.concatenate(parts), offsets_D1)


def _checksum(store: TokenStore) -> int:
  return zlib.crc32(store.offsets_D1.data, zlib.crc32(store.tokens_N.data))


def _save(entry: pathlib.Path, store: TokenStore) -> None:
  entry.parent.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(tempfile.mkdtemp(prefix='.building-', dir=entry.parent))
  building = work / 'entry'  # `work` itself is private; an entry may be shared
  try:
    building.mkdir()
    np.save(building / 'tokens.npy', store.tokens_N)
    np.save(building / 'offsets.npy', store.offsets_D1)
    (building / 'checksum.json').write_text(json.dumps({'crc32': _checksum(store)}))
    try:
      os.replace(building, entry)
    except OSError:
      if _load(entry) is None:  # something damaged is in the way, not another process's entry
        shutil.rmtree(entry, ignore_errors=True)
        os.replace(building, entry)
  finally:
    shutil.rmtree(work, ignore_errors=True)


def _load(entry: pathlib.Path) -> TokenStore | None:
  """Maps an entry; None where it is missing or damaged, and in that case says so."""
  if not entry.exists():
    return None
  try:
    checksum = json.loads((entry / 'checksum.json').read_text())['crc32']
    tokens_N = np.load(entry / 'tokens.npy', mmap_mode='r')
    store = TokenStore(tokens_N, np.load(entry / 'offsets.npy'))
    if _checksum(store) == checksum:
      return store
    reason = 'its checksum differs'
  except (OSError, ValueError, KeyError, TypeError, EOFError) as e:
    reason = one_line(e)
  log.warning('the cached tokens in %s are damaged and will be made again: %s', entry, reason)
  return None
