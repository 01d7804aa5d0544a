import itertools
import json
import threading
import time

import jax
import numpy as np
import pytest
from jax import P

from moe_jax.config import DataConfig, DomainConfig
from moe_jax.data import RowSource, batches
from moe_jax.data.pipeline import _local_rows

S = 32


@pytest.fixture(scope='module')
def cfg(tmp_path_factory):
  root = tmp_path_factory.mktemp('corpus')
  for name, size in (('short', 40), ('long', 400)):
    lines = [json.dumps({'text': f'{name} {i}: ' + 'x y z ' * (size // 6)}) for i in range(60)]
    (root / f'{name}.jsonl').write_text('\n'.join(lines))
  return DataConfig(
    tokenizer='bytes',
    domains={
      'short': DomainConfig(source=str(root / 'short.jsonl'), weight=0.1),
      'long': DomainConfig(source=str(root / 'long.jsonl'), weight=0.3),
      'noise': DomainConfig(source='synthetic', weight=0.6, max_megabytes=0.1),
    },
    sequence_length=S,
    validation_fraction=0.2,
    cache_dir=str(root / 'cache'),
  )


@pytest.fixture(scope='module')
def source(cfg):
  return RowSource(cfg, seed=0, split='train')


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(np.asarray(a[key]), np.asarray(b[key]), err_msg=key)


def documents(store):
  edges = itertools.pairwise(store.offsets_D1)
  return [store.tokens_N[a:b].tobytes() for a, b in edges]


def mesh_of(num_devices):
  if jax.device_count() < num_devices:
    pytest.skip(f'needs {num_devices} devices')
  return jax.make_mesh(
    (max(1, num_devices // 2), min(2, num_devices), 1),
    ('data', 'expert', 'model'),
    devices=jax.devices()[:num_devices],
  )


def sharding_of(num_devices):
  return jax.NamedSharding(mesh_of(num_devices), P(('data', 'expert')))


def first_batches(source, num, *, start=0, devices=1, batch_size=8):
  stream = batches(source, batch_size=batch_size, sharding=sharding_of(devices), start=start)
  taken = list(itertools.islice(stream, num))
  stream.close()
  return taken


def test_row_is_the_same_whatever_was_read_before(cfg, source):
  fresh = RowSource(cfg, seed=0, split='train')
  for g in (5000, 3, 0, 5000, 2**40):
    assert_equal(source.row(g), fresh.row(g))
  assert_equal(source.row(3), RowSource(cfg, seed=0, split='train').row(3))


def test_row_depends_on_the_seed(cfg, source):
  other = RowSource(cfg, seed=1, split='train')
  assert any((source.row(g)['tokens'] != other.row(g)['tokens']).any() for g in range(8))


def test_row_does_not_depend_on_the_order_of_domains(cfg, source):
  turned = DataConfig(**{**vars(cfg), 'domains': dict(reversed(cfg.domains.items()))})
  other = RowSource(turned, seed=0, split='train')
  assert other.domains == source.domains == ('long', 'noise', 'short')
  for g in range(20):
    assert_equal(source.row(g), other.row(g))


def test_epoch_has_every_row_once_and_the_next_another_order(cfg):
  one = DataConfig(**{**vars(cfg), 'domains': {'long': cfg.domains['long']}})
  source = RowSource(one, seed=0, split='train')
  num_rows = len(source._packed[0])

  def epoch(k):
    rows = [source.row(g) for g in range(k * num_rows, (k + 1) * num_rows)]
    return [row['tokens'].tobytes() + row['positions'].tobytes() for row in rows]

  assert sorted(epoch(0)) == sorted(epoch(1)) and epoch(0) != epoch(1)


def test_mixture_shares_equal_the_weights(source):
  domain = [int(source.row(g)['domain']) for g in range(1000)]
  shares = np.bincount(domain) / 1000
  # interleaved, not sampled: off by at most a row
  np.testing.assert_allclose(shares, [0.3, 0.6, 0.1], atol=0.0015)


def test_validation_is_disjoint_from_train(cfg, source):
  validation = RowSource(cfg, seed=0, split='validation')
  for train_store, held_out_store in zip(source._stores, validation._stores, strict=True):
    train, held_out = documents(train_store), documents(held_out_store)
    assert train and held_out and not set(train) & set(held_out)
  assert len(train) + len(held_out) == 60


def test_validation_is_the_same_for_every_seed(cfg):
  one, other = (RowSource(cfg, seed=seed, split='validation') for seed in (0, 1))
  for g in range(30):
    assert_equal(one.row(g), other.row(g))


def test_batch_is_its_rows(source):
  for i, batch in first_batches(source, 2, start=7):
    for r in range(8):
      row = source.row(i * 8 + r)
      assert_equal({key: value[r] for key, value in batch.items()}, row)


def test_batches_start_anywhere(source):
  straight = first_batches(source, 6)
  resumed = first_batches(source, 2, start=4)
  assert [i for i, _ in resumed] == [4, 5]
  for (_, a), (_, b) in zip(straight[4:], resumed, strict=True):
    assert_equal(a, b)
  [(i, _)] = first_batches(source, 1, start=2**31)
  assert i == 2**31


@pytest.mark.parametrize('devices', [2, 8])
def test_batches_do_not_depend_on_the_devices(source, devices):
  one = first_batches(source, 2)
  many = first_batches(source, 2, devices=devices)
  for (_, a), (_, b) in zip(one, many, strict=True):
    assert_equal(a, b)
    assert b['tokens'].sharding.spec == P(('data', 'expert'))
    assert b['tokens'].addressable_shards[-1].data.shape == (8 // devices, S)


def test_batches_may_be_replicated(source):
  sharding = jax.NamedSharding(mesh_of(8), P())
  stream = batches(source, batch_size=3, sharding=sharding, start=0)
  _, batch = next(stream)
  stream.close()
  assert_equal({key: value[2] for key, value in batch.items()}, source.row(2))


def test_batches_read_only_local_rows(source, monkeypatch):
  """Stands in for a second host: its devices are told to be the only addressable ones."""
  sharding = sharding_of(8)
  whole = jax.NamedSharding.addressable_devices_indices_map

  def upper_half(self, shape):
    return {d: index for d, index in whole(self, shape).items() if d.id >= 4}

  monkeypatch.setattr(jax.NamedSharding, 'addressable_devices_indices_map', upper_half)
  assert _local_rows(sharding, 16) == list(range(8, 16))


def test_batch_size_that_does_not_divide_is_one_line(source):
  with pytest.raises(ValueError, match=r'^data\.batch_size=6 does not divide') as e:
    batches(source, batch_size=6, sharding=sharding_of(8), start=0)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('end', ['close', 'drop'])
def test_batches_end_their_threads(source, end):
  before = set(threading.enumerate())
  stream = batches(source, batch_size=8, sharding=sharding_of(1), start=0)
  next(stream)
  assert set(threading.enumerate()) > before
  if end == 'close':
    stream.close()
  del stream
  deadline = time.monotonic() + 5
  while set(threading.enumerate()) - before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert set(threading.enumerate()) <= before


def test_unigram_loss_is_the_entropy_of_a_known_distribution(cfg, source):
  validation = RowSource(cfg, seed=0, split='validation')
  loss = source.unigram_loss(validation, 64)
  assert 0 < loss < np.log(source.tokenizer.vocab_size)
  counts = sum(
    share * (count := np.bincount(store.tokens_N, minlength=257) + 1) / count.sum()
    for share, store in zip([0.3, 0.6, 0.1], source._stores, strict=True)
  )
  rows = [validation.row(g) for g in range(64)]
  targets = np.concatenate([row['targets'][row['loss_mask']] for row in rows])
  assert loss == pytest.approx(-np.log(counts)[targets].mean())


@pytest.mark.parametrize('tokenizer', ['bytes', 'deepseek:4096'])
def test_synthetic_tokens_are_uneven_and_never_end_a_document_early(tokenizer):
  domains = {'s': DomainConfig(source='synthetic', max_megabytes=0.4)}
  cfg = DataConfig(tokenizer=tokenizer, domains=domains, sequence_length=512)
  source = RowSource(cfg, seed=0, split='train')
  tokens = np.concatenate([source.row(g)['tokens'] for g in range(100)])
  count = np.sort(np.bincount(tokens, minlength=source.tokenizer.vocab_size))[::-1]
  assert count[0] > 20 * count[len(count) // 2]
  # documents are 1024 tokens: an eos in each
  assert (tokens == source.tokenizer.eos_id).sum() == pytest.approx(50, abs=5)
