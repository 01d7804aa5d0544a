"""Rows of a mixture by their number, and batches of them on the devices.

Each domain is packed, shuffled and repeated, then the domains are interleaved by Grain: row g of
the mixture, and so batch i = rows [i*B, (i+1)*B), is a pure function of (config, seed). Nothing
remembers what was read; a run resumes by asking for its next batch, on any number of hosts.
"""

# B batch rows, S tokens a row, V vocabulary

import hashlib
import itertools
import sys
from collections.abc import Generator

import grain
import jax
import numpy as np
from jax import P

from moe_jax.config import DataConfig
from moe_jax.data.corpus import SYNTHETIC, documents, split_documents
from moe_jax.data.packing import PackedRows, Row
from moe_jax.data.store import TokenStore, tokenized
from moe_jax.data.synthetic import synthetic_split
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer

SPLITS = ('train', 'validation')
NUM_THREADS = 2
PREFETCHED_BATCHES = 4


class RowSource:
  """The mixture of one split: `row(g)` for any g >= 0, `domains` by domain id, `tokenizer`.

  Domains are ordered by name, so the order in which a config lists them does not matter, and the
  rows drawn within a domain depend on its name but not on the other domains. Every row is equally
  long, so shares of rows are shares of tokens. Validation rows are in one fixed order whatever the
  seed, so runs are compared on the same text.

  Args:
    split: 'train' or 'validation'.

  Raises:
    ValueError: one line that names the field, for an unusable tokenizer or corpus.
  """

  def __init__(self, cfg: DataConfig, *, seed: int, split: str):
    assert split in SPLITS
    self.domains = tuple(sorted(cfg.domains))
    self.tokenizer = load_tokenizer(cfg.tokenizer)
    self.sequence_length = cfg.sequence_length
    weights = [cfg.domains[name].weight for name in self.domains]
    self._shares = np.array(weights) / sum(weights)
    self._stores = [_store(cfg, name, split, self.tokenizer) for name in self.domains]
    seeds = [_domain_seed(seed if split == 'train' else 0, name) for name in self.domains]
    length, eos_id = cfg.sequence_length, self.tokenizer.eos_id
    self._packed = [
      PackedRows(store, length=length, seed=domain_seed, domain=i, eos_id=eos_id)
      for i, (store, domain_seed) in enumerate(zip(self._stores, seeds, strict=True))
    ]
    parts = [
      grain.MapDataset.source(packed).shuffle(seed=domain_seed).repeat()
      for packed, domain_seed in zip(self._packed, seeds, strict=True)
    ]
    # Grain truncates weights to hundredths of the smallest: 0.3/0.1 must reach it as 3, not as
    # 2.9999999999999996.
    ratios = [round(weight / min(weights), 9) for weight in weights]
    self._mixture = grain.MapDataset.mix(parts, ratios)

  def row(self, g: int) -> Row:
    """Row g of the mixture: the dict that `PackedRows` describes."""
    row = self._mixture[g]
    assert row is not None  # Grain's type allows for filtered elements
    return row

  def unigram_loss(self, validation: 'RowSource', num_rows: int) -> float:
    """Nats per target of a model that knows only how frequent each token is in this split.

    Its probabilities are this split's counts plus one within each domain, mixed by the domains'
    weights; the targets are those of the first `num_rows` rows of `validation` under its loss mask.
    A trained model must do better.
    """
    V = self.tokenizer.vocab_size
    probability_V = np.zeros(V)
    for share, store in zip(self._shares, self._stores, strict=True):
      count_V = np.bincount(store.tokens_N, minlength=V) + 1.0
      probability_V += share * count_V / count_V.sum()
    target_count_V = np.zeros(V)
    for g in range(num_rows):
      row = validation.row(g)
      target_count_V += np.bincount(row['targets'][row['loss_mask']], minlength=V)
    return float(-(target_count_V @ np.log(probability_V)) / target_count_V.sum())


def _store(cfg: DataConfig, name: str, split: str, tokenizer: Tokenizer) -> TokenStore:
  domain = cfg.domains[name]
  if domain.source == SYNTHETIC:
    stores = synthetic_split(
      vocab_size=tokenizer.vocab_size,
      eos_id=tokenizer.eos_id,
      seed=_domain_seed(0, name),  # the chain is part of the domain, not of the run
      max_megabytes=domain.max_megabytes,
      validation_fraction=cfg.validation_fraction,
    )
    return stores[SPLITS.index(split)]
  texts = split_documents(documents(name, domain), cfg.validation_fraction)
  return tokenized(texts[SPLITS.index(split)], tokenizer, cache_dir=cfg.cache_dir)


def _domain_seed(seed: int, name: str) -> int:
  """Far apart for neighbouring seeds: Grain adds the epoch to it."""
  digest = hashlib.blake2b(f'{seed} {name}'.encode(), digest_size=4).digest()
  return int.from_bytes(digest)


class _LocalBatches:
  """A random-access source of batches that holds only some of their rows."""

  def __init__(self, source: RowSource, batch_size: int, rows: list[int]):
    self._source, self.batch_size, self._rows = source, batch_size, rows

  def __len__(self) -> int:
    return sys.maxsize // self.batch_size

  def __repr__(self) -> str:
    return f'_LocalBatches(batch_size={self.batch_size}, local_rows={len(self._rows)})'

  def __getitem__(self, index: int) -> Row:
    first = index * self.batch_size
    rows = [self._source.row(first + r) for r in self._rows]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def batches(
  source: RowSource, *, batch_size: int, sharding: jax.sharding.NamedSharding, start: int
) -> Generator[tuple[int, dict[str, jax.Array]]]:
  """Yields (i, batch i) for i = start, start + 1, ... without end, read ahead by Grain's threads.

  A batch has the keys of `RowSource.row`, each array with a leading B. A process reads only the
  rows that its own devices hold; the global arrays are the same for every number of processes.
  Close the iterator to end its threads; dropping it does so too.

  Args:
    sharding: how the leading dimension is split; other dimensions are not.

  Raises:
    ValueError: batch_size does not divide over the devices that `sharding` names.
  """
  leading = jax.sharding.NamedSharding(sharding.mesh, P(*sharding.spec[:1]))
  local = _local_rows(leading, batch_size)
  return _generate(_LocalBatches(source, batch_size, local), leading, local, start)


def _local_rows(leading: jax.sharding.NamedSharding, batch_size: int) -> list[int]:
  try:
    leading.shard_shape((batch_size,))
  except ValueError as e:
    rule = f'does not divide over the devices of {leading.spec} on {dict(leading.mesh.shape)}'
    remedy = 'Use a multiple of their number.'
    raise ValueError(f'data.batch_size={batch_size} {rule}. {remedy}') from e
  slices = leading.addressable_devices_indices_map((batch_size,)).values()
  rows = {row for index in slices if index for row in range(*index[0].indices(batch_size))}
  return sorted(rows)


def _generate(
  source: _LocalBatches, leading: jax.sharding.NamedSharding, local: list[int], start: int
) -> Generator[tuple[int, dict[str, jax.Array]]]:
  B = source.batch_size
  place = {row: i for i, row in enumerate(local)}

  def global_array(values: np.ndarray) -> jax.Array:
    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None
      first, stop, _ = index[0].indices(B)
      return values[place[first] : place[first] + stop - first]

    return jax.make_array_from_callback((B, *values.shape[1:]), leading, shard)

  reading = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=PREFETCHED_BATCHES)
  dataset = grain.MapDataset.source(source)[start:].to_iter_dataset(reading)
  iterator = iter(dataset)
  try:
    for i in itertools.count(start):
      yield i, {key: global_array(values) for key, values in next(iterator).items()}
  finally:
    iterator.close()
