"""The Hopper kernels of attention in the interpreter, with its race detector."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax import sharding as sh
from moe_jax.ops.attention import attention, attention_and_lse, mosaic
from moe_jax.ops.attention.bounds import visible_bounds
from moe_jax.ops.attention.mosaic_forward import tile_of
from moe_jax.ops.attention.schedule import lists_of_tiles

# B batch  S sequence  H query heads  G key-value heads  C key width  V value width
SCALE = 0.1
# probabilities, their gradients and results are each rounded to 8 bits
BFLOAT16 = 5e-3


@dataclasses.dataclass(frozen=True)
class Case:
  ends: tuple[int, ...]  # of the documents; the last is the length
  heads: int = 1
  shared: int = 1
  widths: tuple[int, int] = (128, 64)
  window: int | None = None
  sinks: bool = False

  def operands(self):
    S, H, (C, V) = self.ends[-1], self.heads, self.widths
    keys = iter(jax.random.split(jax.random.key(0), 6))
    draw = lambda *shape: jax.random.normal(next(keys), shape).astype(jnp.bfloat16)
    G = H // self.shared
    q, k, v = draw(1, S, H, C), draw(1, S, G, C), draw(1, S, G, V)
    sink = jax.random.normal(next(keys), (H,)) if self.sinks else None
    segment = jnp.searchsorted(jnp.array(self.ends), jnp.arange(S), side='right')[None]
    return (q, k, v, sink), segment, (draw(1, S, H, V), jax.random.normal(next(keys), (1, H, S)))


CASES = {
  'one_short_document': Case((40,)),
  'not_a_multiple_of_the_tile': Case((203,)),
  'documents': Case((70, 71, 150, 290)),
  'window': Case((300,), window=90),
  'window_and_documents': Case((30, 260), window=100, sinks=True),
  'shared_keys_and_sinks': Case((100, 264), heads=4, shared=2, sinks=True),
  'wide_keys': Case((140,), widths=(192, 128)),
}
QUICK = ('one_short_document',)
SOME = [pytest.param(CASES[n], marks=() if n in QUICK else pytest.mark.slow, id=n) for n in CASES]


@pytest.fixture
def interpreter(monkeypatch):
  monkeypatch.setattr(mosaic, 'on_hopper', lambda: True)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()


@pytest.fixture(autouse=True)
def no_races(capfd):
  yield
  assert 'RACE DETECTED' not in ''.join(capfd.readouterr())


def run(case, implementation, *, wide=False):
  """Output, logsumexp and all gradients."""
  operands, segment, cotangents = case.operands()
  if wide:
    operands, cotangents = jax.tree.map(lambda a: a.astype(jnp.float32), (operands, cotangents))
  start = jnp.zeros(1, jnp.int32)

  def call(q, k, v, sink):
    return attention_and_lse(
      q, k, v, segment, segment, start, sink,
      scale=SCALE, window=case.window, implementation=implementation,
    )  # fmt: skip

  out, pull = jax.vjp(call, *operands)
  return jax.tree.leaves((out, pull(cotangents)))


def close(got, want, limit=BFLOAT16):
  got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
  assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


@pytest.mark.parametrize('case', SOME)
def test_values_and_gradients_match_the_reference(interpreter, case):
  for got, want in zip(run(case, 'mosaic'), run(case, 'reference', wide=True), strict=True):
    # a sink's gradient is a few numbers, each a sum in which much cancels
    close(got, want, 4 * BFLOAT16 if got.ndim == 1 else BFLOAT16)


@pytest.mark.slow
def test_runs_on_a_mesh_and_differentiates(interpreter):
  # one device: the interpreter keeps one shared memory for all of them
  mesh = sh.make_mesh((1, 1, 1))
  (q, k, v, sink), segment, _ = CASES['one_short_document'].operands()

  def loss(q, k, v, segment, by):
    start = jnp.zeros(1, jnp.int32)
    o = attention(q, k, v, segment, segment, start, sink, scale=SCALE, implementation=by)
    return (o.astype(jnp.float32) ** 2).sum()

  def grads(by):
    with jax.set_mesh(mesh):
      args = (jax.device_put(a, sh.HEADS) for a in (q, k, v))
      tokens = jax.device_put(segment, sh.TOKENS)
      fn = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=4)
      return jax.device_get(fn(*args, tokens, by))

  for got, want in zip(grads('mosaic'), grads('reference'), strict=True):
    # both round
    close(got, want, 2 * BFLOAT16)


def test_remat_that_keeps_the_results_runs_the_forward_kernel_once(monkeypatch):
  monkeypatch.setattr(mosaic, 'on_hopper', lambda: True)
  (q, k, v, _), segment, _ = CASES['one_short_document'].operands()
  names = jax.checkpoint_policies.save_only_these_names('attention_out', 'attention_lse')

  def kernels(policy):
    @functools.partial(jax.checkpoint, policy=policy)
    def loss(q, k, v, segment):
      o = attention(2 * q, k, v, segment, segment, jnp.zeros(1, jnp.int32), scale=SCALE)
      return (o.astype(jnp.float32) ** 2).sum()

    with jax.set_mesh(sh.make_mesh((1, 1, 1))):
      args = *(jax.device_put(a, sh.HEADS) for a in (q, k, v)), jax.device_put(segment, sh.TOKENS)
      return str(jax.make_jaxpr(jax.value_and_grad(loss))(*args)).count('attention_forward')

  # a kernel is mentioned more than once
  assert kernels(names) < kernels(None)


@pytest.mark.parametrize('window', [None, 1, 3])
def test_bounds_name_the_keys_of_a_query_and_the_queries_of_a_key(window):
  segment = np.array([[1, 1, 1, 2, 2, 1, 0, 0], [3, 3, 3, 3, 3, 3, 3, 3]])

  def sees(b, s, t):
    near = window is None or abs(s - t) < window
    return near and len(set(segment[b, min(s, t) : max(s, t) + 1])) == 1

  first, end = (np.asarray(a) for a in visible_bounds(jnp.asarray(segment), window))
  for b, s in np.ndindex(segment.shape):
    assert first[b, s] == min(t for t in range(s + 1) if sees(b, s, t))
    assert end[b, s] == 1 + max(t for t in range(s, 8) if sees(b, s, t))


@pytest.mark.parametrize('heads, tiles', [(64, 64), (16, 128), (256, 32), (1, 5)])
def test_lists_hold_every_tile_once_and_keep_cores_busy(heads, tiles):
  lists = lists_of_tiles(heads, tiles, 132)
  assert np.array_equal(np.sort(lists[lists >= 0]), np.arange(heads * tiles))
  assert (lists[:, -1] == -1).all()
  # each list to the core that is free first
  cores = np.zeros(132)
  for work in np.where(lists >= 0, lists % tiles + 1, 0).sum(1):
    cores[cores.argmin()] += work
  assert cores.max() <= max(1.02 * cores.mean(), tiles)


@pytest.mark.parametrize('widths', [(64, 64), (128, 128), (192, 128), (256, 64)])
def test_tiles_fit_into_shared_memory(widths):
  C, V = widths
  tile = tile_of(C, V)
  assert 2 * (128 * C + 128 * 64 + tile.stages * tile.step * (C + V)) < 232448


def test_unfit_operands_are_refused_with_the_reason(monkeypatch):
  monkeypatch.setattr(mosaic, 'on_hopper', lambda: True)
  ones, start = jnp.ones((1, 8), jnp.int32), jnp.zeros(1, jnp.int32)

  def ask(c, v, dtype=jnp.bfloat16):
    q, k = jnp.zeros((2, 1, 8, 2, c), dtype)
    operands = q, k, jnp.zeros((1, 8, 2, v), dtype)
    attention(*operands, ones, ones, start, scale=1.0, implementation='mosaic')

  with pytest.raises(NotImplementedError, match='needs bfloat16 operands, got float32'):
    ask(64, 64, jnp.float32)
  with pytest.raises(NotImplementedError, match=r'at most 320 .* got 256 and 256'):
    ask(256, 256)
  with pytest.raises(NotImplementedError, match=r'multiples of 64, .* got 80 and 80'):
    ask(80, 80)
