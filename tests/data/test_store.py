import concurrent.futures
import itertools
import logging
import threading

import numpy as np
import pytest

from moe_jax.data import load_tokenizer
from moe_jax.data.store import tokenized

TEXTS = ['one', 'two and more', 'three\n']


class Counting:
  """A byte tokenizer that counts its calls."""

  def __init__(self):
    self._inner = load_tokenizer('bytes')
    self.calls = 0

  def __getattr__(self, name):
    return getattr(self._inner, name)

  def encode_batch(self, texts):
    self.calls += 1
    return self._inner.encode_batch(texts)


def contents(store):
  tokens, offsets = store.tokens_N, store.offsets_D1
  return [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]


WANTED = [[*text.encode(), 256] for text in TEXTS]


def entry(folder):
  [path] = folder.iterdir()  # nothing is left half-built
  return path


def test_store_holds_each_document_and_its_end(tmp_path):
  store = tokenized(TEXTS, load_tokenizer('bytes'), cache_dir=str(tmp_path))
  assert contents(store) == WANTED
  assert store.tokens_N.dtype == np.uint16


def test_store_uses_32_bits_where_16_do_not_hold_the_ids(tmp_path):
  store = tokenized(TEXTS, load_tokenizer('deepseek'), cache_dir=str(tmp_path))
  assert store.tokens_N.dtype == np.uint32


def test_store_tokenizes_once(tmp_path):
  tokenizer = Counting()
  for _ in range(2):
    store = tokenized(TEXTS, tokenizer, cache_dir=str(tmp_path))
    assert isinstance(store.tokens_N, np.memmap) and contents(store) == WANTED
  assert tokenizer.calls == 1


@pytest.mark.parametrize('other', [['onet', 'wo and more', 'three\n'], TEXTS[::-1], TEXTS[:2]])
def test_store_key_tells_texts_apart(tmp_path, other):
  tokenized(TEXTS, load_tokenizer('bytes'), cache_dir=str(tmp_path))
  store = tokenized(other, load_tokenizer('bytes'), cache_dir=str(tmp_path))
  assert contents(store) == [[*text.encode(), 256] for text in other]


def test_store_key_tells_tokenizers_apart(tmp_path):
  for spec in ('bytes', 'deepseek:300', 'deepseek:301'):
    tokenized(TEXTS, load_tokenizer(spec), cache_dir=str(tmp_path))
  assert len(list(tmp_path.iterdir())) == 3


def flip(path):
  raw = bytearray(path.read_bytes())
  raw[-1] ^= 1
  path.write_bytes(raw)


DAMAGE = {
  'flipped tokens': lambda e: flip(e / 'tokens.npy'),
  'flipped offsets': lambda e: flip(e / 'offsets.npy'),
  'truncated': lambda e: (e / 'tokens.npy').write_bytes((e / 'tokens.npy').read_bytes()[:-1]),
  'emptied': lambda e: (e / 'offsets.npy').write_bytes(b''),
  'missing file': lambda e: (e / 'tokens.npy').unlink(),
  'garbage': lambda e: (e / 'checksum.json').write_text('[]'),
}


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE.keys())
def test_store_damaged_entry_is_reported_and_made_again(tmp_path, caplog, damage):
  tokenizer = Counting()
  tokenized(TEXTS, tokenizer, cache_dir=str(tmp_path))
  damage(entry(tmp_path))
  assert contents(tokenized(TEXTS, tokenizer, cache_dir=str(tmp_path))) == WANTED
  assert 'damaged' in caplog.text
  caplog.clear()
  assert contents(tokenized(TEXTS, tokenizer, cache_dir=str(tmp_path))) == WANTED
  assert tokenizer.calls == 2 and not caplog.records
  assert len(list(entry(tmp_path).iterdir())) == 3


def test_store_unwritable_cache_falls_back_to_memory_with_one_line(tmp_path, caplog):
  (tmp_path / 'file').write_text('')
  with caplog.at_level(logging.WARNING):
    store = tokenized(TEXTS, load_tokenizer('bytes'), cache_dir=str(tmp_path / 'file' / 'cache'))
  assert contents(store) == WANTED
  assert len(caplog.records) == 1 and '\n' not in caplog.text.strip()


def test_store_default_folder_follows_xdg(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  tokenized(TEXTS, load_tokenizer('bytes'), cache_dir='')
  assert len(list((tmp_path / 'moe_jax').iterdir())) == 1


def test_store_writers_may_race(tmp_path):
  barrier = threading.Barrier(8)

  class Together(Counting):
    def encode_batch(self, texts):
      barrier.wait(timeout=10)
      return super().encode_batch(texts)

  def write(_):
    return contents(tokenized(TEXTS, Together(), cache_dir=str(tmp_path)))

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(write, range(8))) == [WANTED] * 8
  assert len(list(entry(tmp_path).iterdir())) == 3
