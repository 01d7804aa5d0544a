import itertools

import numpy as np
import pytest

from moe_jax.data.packing import PackedRows
from moe_jax.data.store import TokenStore

EOS = 0


def make_store(lengths):
  """Documents whose tokens are all different, so that each can be recognised, and an eos each."""
  fresh = itertools.count(1)
  parts = [[*itertools.islice(fresh, n - 1), EOS] for n in lengths]
  offsets = np.cumsum([0, *lengths])
  return TokenStore(np.concatenate(parts).astype(np.uint16), offsets.astype(np.int64))


STORES = {
  'many short': make_store([2, 3, 2, 5, 4, 2, 9, 3]),
  'one long': make_store([100]),
  'mixed': make_store([31, 2, 70, 16, 17, 15, 3]),
  'shorter than a row': make_store([3, 4]),
  'ends with a row': make_store([17, 16]),
}


@pytest.fixture(params=STORES.values(), ids=STORES.keys())
def store(request):
  return request.param


def rows(store, **kwargs):
  packed = PackedRows(store, **{'length': 16, 'seed': 3, 'domain': 2, 'eos_id': EOS} | kwargs)
  return [packed[r] for r in range(len(packed))]


def documents(store):
  offsets = store.offsets_D1
  return [store.tokens_N[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def test_packing_shapes_and_types(store):
  for row in rows(store):
    for key in ('tokens', 'targets', 'segments', 'positions'):
      assert row[key].shape == (16,) and row[key].dtype == np.int32
    assert row['loss_mask'].shape == (16,) and row['loss_mask'].dtype == bool
    assert row['domain'].shape == () and row['domain'].dtype == np.int32 and row['domain'] == 2


def test_packing_predicts_every_token_once(store):
  predicted = sorted(t for row in rows(store) for t in row['targets'][row['loss_mask']].tolist())
  wanted = sorted(t for document in documents(store) for t in document[1:])
  assert predicted == wanted


def test_packing_never_predicts_across_documents(store):
  following = {a: b for document in documents(store) for a, b in itertools.pairwise(document)}
  for row in rows(store):
    for token, target, mask in zip(row['tokens'], row['targets'], row['loss_mask'], strict=True):
      assert not mask or following[token] == target
      assert token != EOS or not mask


def test_packing_positions_restart_with_documents_and_rows(store):
  for row in rows(store):
    segments, positions = row['segments'], row['positions']
    assert positions[0] == 0
    same = segments[1:] == segments[:-1]
    real = segments[1:] > 0
    assert (positions[1:] == np.where(same, positions[:-1] + 1, 0))[real].all()


def test_packing_segments_count_documents_from_one(store):
  for row in rows(store):
    real = row['segments'][row['segments'] > 0]
    ends = row['tokens'][: real.size] == EOS
    np.testing.assert_array_equal(real, 1 + np.cumsum(ends) - ends)


def test_packing_pads_only_the_last_row(store):
  *full, last = rows(store)
  assert all((row['segments'] > 0).all() for row in full)
  padding = last['segments'] == 0
  assert not last['loss_mask'][padding].any()
  assert (np.diff(padding.astype(int)) >= 0).all()


def test_packing_order_of_documents_follows_the_seed():
  def first_tokens(seed):
    return [row['tokens'].tolist() for row in rows(STORES['many short'], seed=seed)]

  assert first_tokens(3) == first_tokens(3)
  assert first_tokens(3) != first_tokens(4)
