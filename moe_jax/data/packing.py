"""Documents laid end to end and cut into rows, each row computed from its number alone."""

# N tokens of the split, D documents, S tokens a row

import numpy as np

from moe_jax.data.store import TokenStore

Row = dict[str, np.ndarray]


class PackedRows:
  """A random-access source: row r spans tokens r*S to r*S + S of the shuffled documents.

  Neighbouring rows share one token, the last target of one being the first input of the next, so
  that one epoch predicts every token once, apart from the first of each document, which nothing
  predicts.

  `rows[r]` is a dict of
    tokens, targets: int32 [S], targets being the tokens one place on.
    segments: int32 [S], the document within the row, from 1; 0 on padding.
    positions: int32 [S], from 0 at the start of each document and of the row.
    loss_mask: bool [S], whether the target continues the input's document; an eos belongs to the
      document it ends.
    domain: int32 [].
  Only the last row is padded, with eos.
  """

  def __init__(self, store: TokenStore, *, length: int, seed: int, domain: int, eos_id: int):
    order_D = np.random.default_rng(seed).permutation(store.offsets_D1.size - 1)
    self._tokens_N = store.tokens_N
    self._source_D = store.offsets_D1[order_D]  # where a document begins in the store
    # ... and in the order of rows
    self._starts_D1 = np.concatenate([[0], np.cumsum(np.diff(store.offsets_D1)[order_D])])
    self._length, self._domain, self._eos_id = length, domain, eos_id

  def __len__(self) -> int:
    num_targets = self._tokens_N.size - 1
    return max(1, -(-num_targets // self._length))

  def __repr__(self) -> str:
    return f'PackedRows(rows={len(self)}, length={self._length}, domain={self._domain})'

  def __getitem__(self, index: int) -> Row:
    row, S, starts_D1 = index, self._length, self._starts_D1
    assert 0 <= row < len(self)
    place = np.arange(row * S, min(row * S + S + 1, self._tokens_N.size))
    document = np.searchsorted(starts_D1, place, side='right') - 1
    within = place - starts_D1[document]
    tokens = self._tokens_N[self._source_D[document] + within]
    num = place.size - 1  # inputs that have a target
    return {
      'tokens': _padded(tokens[:num], S, self._eos_id),
      'targets': _padded(tokens[1:], S, self._eos_id),
      'segments': _padded(document[:num] - document[0] + 1, S, 0),
      'positions': _padded(np.minimum(within, place - row * S)[:num], S, 0),
      'loss_mask': _padded(document[:num] == document[1:], S, False),
      'domain': np.array(self._domain, np.int32),
    }


def _padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
  """Fills `values` up to `length`; booleans stay so, integers become int32."""
  out = np.full(length, fill, bool if values.dtype == bool else np.int32)
  out[: values.size] = values
  return out
