"""A corpus of several domains as one small file of tokens: what the comparison trains on.

  python -m moe_jax.data.build_corpus --out=corpus
  python -m experiments.balance.tokens --corpus=corpus --out=tokens.xz

An .xz file of an .npz: for each domain and split the documents' tokens end to end, and where each
begins. 10 MB hold about 10M tokens, and no text or tokenizer is needed to train.
"""

import argparse
import io
import lzma
from pathlib import Path

import numpy as np

from moe_jax.config import DomainConfig
from moe_jax.data.corpus import documents, split_documents
from moe_jax.data.packing import PackedRows, Row
from moe_jax.data.store import TokenStore
from moe_jax.data.tokenizer import load_tokenizer

DOMAINS = ('code_cpp', 'code_py', 'en_api', 'en_lit', 'en_ref', 'xx_he')
TOKENIZER = 'deepseek:16384'
SPLITS = ('train', 'validation')


def write(corpus: Path, out: Path, *, train_tokens: int, validation_tokens: int) -> None:
  """Tokenizes the first documents of every domain, up to so many tokens of each split."""
  tokenizer, arrays = load_tokenizer(TOKENIZER), {'eos_id': np.array(0)}
  arrays['eos_id'] = np.array(tokenizer.eos_id)
  for name in DOMAINS:
    texts = documents(name, DomainConfig(source=str(corpus / f'{name}.jsonl')))
    for split, texts_of, limit in zip(
      SPLITS, split_documents(texts, 0.05), (train_tokens, validation_tokens), strict=True
    ):
      parts: list[np.ndarray] = []
      for text in texts_of:
        if sum(map(len, parts)) >= limit:
          break
        ids = tokenizer.encode_batch([text[:100_000]])[0]
        parts.append(np.array([*ids, tokenizer.eos_id], np.uint16))
      arrays[f'{name}.{split}.offsets'] = np.cumsum([0, *map(len, parts)]).astype(np.int64)
      arrays[f'{name}.{split}.tokens'] = np.concatenate(parts)
  raw = io.BytesIO()
  np.savez(raw, **arrays)  # pyright: ignore[reportArgumentType]
  out.write_bytes(lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME))


class Rows:
  """Row g of a split: of domain g % 6, so that every batch has equal shares."""

  def __init__(self, path: Path, split: str, *, length: int):
    with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as file:
      eos_id = int(file['eos_id'])
      stores = [
        TokenStore(file[f'{name}.{split}.tokens'], file[f'{name}.{split}.offsets'])
        for name in DOMAINS
      ]
    self._packed = [
      PackedRows(store, length=length, seed=0, domain=i, eos_id=eos_id)
      for i, store in enumerate(stores)
    ]

  def __len__(self) -> int:
    """Rows before any domain repeats itself."""
    return min(map(len, self._packed)) * len(self._packed)

  def batch(self, index: int, size: int) -> Row:
    """Rows [index * size, (index + 1) * size)."""
    numbers = range(index * size, (index + 1) * size)
    rows = [self._row(*divmod(g, len(self._packed))) for g in numbers]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

  def _row(self, turn: int, domain: int) -> Row:
    packed = self._packed[domain]
    return packed[turn % len(packed)]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--corpus', type=Path, required=True)
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument('--train-tokens', type=int, default=2_200_000, help='of each domain')
  parser.add_argument('--validation-tokens', type=int, default=60_000, help='of each domain')
  args = parser.parse_args()
  write(
    args.corpus,
    args.out,
    train_tokens=args.train_tokens,
    validation_tokens=args.validation_tokens,
  )


if __name__ == '__main__':
  main()
