"""NSA's kernels, interpreted, against its masks: values and gradients over several documents."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops import nsa
from moe_jax.ops.attention.grouped import grouped_probabilities, weighted_values
from moe_jax.ops.blocks import Span
from moe_jax.ops.nsa import fused, mosaic_importance, runs, triton_block_keys, triton_runs
from moe_jax.ops.nsa.triton_choice import top_blocks
from tests.ops.documents import together

# G key-value heads  M query heads of each  C width
G, M, C, SCALE = 2, 4, 16, 0.25
SIZES = nsa.Sizes(compress_length=4, stride=2, select_length=4, top_blocks=4, window=6)


@contextlib.contextmanager
def interpreted(capfd):
  """Mosaic kernels, with the race detector."""
  try:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
      yield
  finally:
    interpret_pallas_call.reset_gpu_interpret_mode_state()
  assert 'RACE DETECTED' not in ''.join(capfd.readouterr())


def compare(documents, dtype, tolerance):
  B, S = len(documents), max(map(sum, documents))
  position_BS, segment_BS = together(documents, S)
  keys = jax.random.split(jax.random.key(0), 9)
  draw = lambda i, *shape: jax.random.normal(keys[i], shape).astype(dtype)
  q, do = draw(0, B, S, G, M, C), draw(1, B, S, G, M, C)
  branches = tuple(draw(i, B, S, G, C) for i in range(2, 8))
  # a branch may be shut
  gate = jax.nn.sigmoid(draw(8, B, S, G, M, 3)).at[..., 0, 0].set(0)
  end_BN, _ = nsa.closed_blocks(position_BS, segment_BS, SIZES)
  # padding is nobody's: its outputs do not count
  do = jnp.where((segment_BS > 0)[..., None, None, None], do, 0)

  def masks(q, gate, *kv):
    span = Span(segment_BS, position_BS, segment_BS, position_BS, jnp.zeros(B, jnp.int32))
    compressed, selected, window = (nsa.KeyValue(kv[i], kv[i + 1]) for i in (0, 2, 4))
    return nsa.attention(q, compressed, selected, window, gate, span, sizes=SIZES, scale=SCALE)

  def kernels(q, gate, *kv):
    compressed = nsa.KeyValue(*(jax.vmap(lambda x, at: x[at])(x, end_BN) for x in kv[:2]))
    selected, window = nsa.KeyValue(kv[2], kv[3]), nsa.KeyValue(kv[4], kv[5])
    return nsa.rows_attention(
      q, compressed, selected, window, gate, position_BS, segment_BS, sizes=SIZES, scale=SCALE
    )

  wide = [a.astype(jnp.float32) for a in (q, gate, *branches)]
  want, pull = jax.vjp(masks, *wide)
  got, pull_got = jax.vjp(jax.jit(kernels), q, gate, *branches)
  real = np.asarray(segment_BS) > 0
  pairs = zip((got[real], *pull_got(do)), (want[real], *pull(do.astype(jnp.float32))), strict=True)
  for a, b in pairs:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


@pytest.mark.slow
def test_kernels_of_all_branches_are_the_masks():
  compare([[21, 3, 9]], jnp.float32, 1e-5)


@pytest.mark.slow
def test_rows_of_several_documents_and_chunks(monkeypatch):
  monkeypatch.setattr(fused, '_CHUNK_BYTES', 1 << 12)
  monkeypatch.setattr(fused, '_CHUNK_CHOICES', 1 << 8)
  monkeypatch.setattr(triton_block_keys, '_MOST', 8)
  compare([[70, 1, 65], [2, 90]], jnp.float32, 1e-5)


def probabilities(q, k_RGC, first, count):
  """Summed over the heads of a group, in float64, and the base-2 logsumexp."""
  score = np.asarray(jnp.einsum('tgmc,rgc->tgmr', q, k_RGC), np.float64) * SCALE
  T, groups, heads = score.shape[:3]
  sums = np.zeros((T, groups, k_RGC.shape[0]))
  lse = np.full((T, groups, heads), -1e30, np.float32)
  for t in range(T):
    seen = slice(first[t], first[t] + count[t])
    if count[t]:
      e = np.exp(score[t, :, :, seen])
      lse[t] = np.log2(e.sum(-1))
      sums[t, :, seen] = (e / e.sum(-1, keepdims=True)).sum(1)
  return sums, lse


@pytest.mark.parametrize('start', (0, 32))
@pytest.mark.parametrize('by', ('triton', 'mosaic'))
def test_importance_is_the_sum_of_probabilities_over_heads(by, start, capfd):
  heads, width, dtype = (M, C, jnp.float32) if by == 'triton' else (8, 64, jnp.bfloat16)
  q = jax.random.normal(jax.random.key(0), (50, G, heads, width)).astype(dtype)
  k = jax.random.normal(jax.random.key(1), (180, G, width)).astype(dtype)
  t = np.arange(50, dtype=np.int32)
  first, count = t // 20 * 60, t % 20 * 3
  wide = q.astype(jnp.float32), k.astype(jnp.float32)
  want, lse = probabilities(*wide, first, count)
  args = q, k, jnp.asarray(first), jnp.asarray(count), jnp.asarray(lse), jnp.array([start])
  if by == 'triton':
    got = triton_runs.importance(*args, queries=32, scale=SCALE)
  else:
    with interpreted(capfd):
      got = mosaic_importance.importance(*args, queries=32, scale=SCALE)
  behind = np.arange(180) - first[:, None]
  seen = ((behind >= 0) & (behind < count[:, None]))[:, None]
  n = min(32, 50 - start)
  got = np.where(seen[start : start + n], np.asarray(got)[:n, :, :180], 0)
  np.testing.assert_allclose(got, want[start : start + n], atol=1e-4)


def test_chosen_blocks_are_the_forced_and_the_best_the_earliest_of_equals():
  last, count = np.array([0, 1, 4, 9, 10]), np.array([0, 1, 6, 18, 22])
  first = np.array([0, 3, 1, 0, 2])
  # few values, so that many are equal; what is not seen is not read
  sums = np.asarray(jax.random.randint(jax.random.key(0), (5, 1, 26), 0, 3), np.float32)
  behind = np.arange(26) - first[:, None]
  seen = (behind >= 0) & (behind < count[:, None])
  args = np.where(seen[:, None], sums, np.nan), first, count, last
  got = np.asarray(top_blocks(*map(jnp.asarray, args), k=6, blocks=11, per_block=2, reach=2))
  for q in range(5):
    value = np.zeros(11 + 1)
    for i in range(count[q]):
      for place in (i, i + 1):  # each covers two places, a block two
        value[place // 2] += sums[q, 0, first[q] + i]
    forced = {0, int(last[q]), max(int(last[q]) - 1, 0)}
    order = sorted(range(last[q] + 1), key=lambda j: (j not in forced, -value[j], j))
    assert set(got[q, 0, : len(order)]) == set(order[:6])


DENSE = [
  pytest.param([[21, 3, 9]], 1, marks=pytest.mark.slow, id='short'),
  pytest.param([[130, 5, 60]], 2, marks=pytest.mark.slow, id='documents'),
  pytest.param([[150], [1, 20]], 1, marks=pytest.mark.slow, id='rows'),
]


@pytest.mark.parametrize(('documents', 'heads'), DENSE)
def test_runs_by_the_dense_kernels_are_the_masks_and_so_are_their_gradients(
  documents, heads, capfd
):
  B, S, width = len(documents), max(map(sum, documents)) + 2, 64
  first_BS, count_BS = fused.blocks_seen(*together(documents, S), SIZES)
  N = -(-S // SIZES.stride)
  behind_BSN = jnp.arange(N) - first_BS[..., None]
  seen = ((behind_BSN >= 0) & (behind_BSN < count_BS[..., None]))[:, None, None]
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (B, S, 1, heads, width), (B, N, 1, width), (B, N, 1, width), (B, S, 1, heads, width)
  q, k, v, do = (
    jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True)
  )

  def masks(q, k, v):
    p = grouped_probabilities(q, k, seen, scale=SCALE)
    return weighted_values(p, v)

  wide = tuple(a.astype(jnp.float32) for a in (q, k, v))
  o, pull = jax.vjp(masks, *wide)
  score = jnp.einsum('bsgmc,bngc->bsgmn', *wide[:2]) * SCALE
  score = jnp.where(jnp.moveaxis(seen, 3, 1), score, -jnp.inf)
  lse = jnp.maximum(jax.nn.logsumexp(score, axis=-1) / np.log(2), -1e30)
  delta = (o * do.astype(jnp.float32)).sum(-1)
  with interpreted(capfd):
    got = runs.dense_gradients(q, k, v, first_BS, count_BS, do, lse, delta, scale=SCALE)
    got_o, got_lse = runs.dense_forward(q, k, v, first_BS, count_BS, scale=SCALE)
  np.testing.assert_allclose(got_lse, lse, atol=1e-3, rtol=1e-5)
  for a, b in zip((got_o, *got), (o, *pull(do.astype(jnp.float32))), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) < 5e-3 * np.linalg.norm(b)


def test_the_kernels_say_why_they_cannot():
  q = jnp.zeros((1, 4, G, M, C), jnp.bfloat16)
  assert 'needs an NVIDIA GPU' in (nsa.unsupported(q, C, SIZES) or '')


@pytest.mark.parametrize('keys', [3, 34, 40])
def test_importance_lowers_for_hopper_with_any_number_of_keys(keys):
  # what TMA refuses, the interpreter takes
  shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
  args = (
    shape(jnp.bfloat16, 544, 2, 16, 64), shape(jnp.bfloat16, keys, 2, 64), shape(jnp.int32, 544),
    shape(jnp.int32, 544), shape(jnp.float32, 544, 2, 16), shape(jnp.int32),
  )  # fmt: skip
  hopper = AbstractDevice(device_kind='NVIDIA H100', num_cores=132, platform='gpu')
  run = functools.partial(mosaic_importance.importance, queries=512, scale=SCALE)
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=hopper)):
    lowered = jax.jit(run).trace(*args).lower(lowering_platforms=('cuda',))
  assert 'mosaic_gpu' in lowered.as_text()
