"""Speculative decoding writes what greedy decoding writes, faster where drafts are good."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.config import MHCConfig, MLAConfig, ModelConfig, MoEConfig, MTPConfig
from moe_jax.infer.decode import generate
from moe_jax.infer.speculative import _functions, speculate
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Decoder, head_DV
from moe_jax.precision import policy
from tests.models import kinds, tiny_v4

VOCABULARY = 8  # small, so that random drafts are sometimes right
# a text of 30 tokens more goes on over windows, blocks and compressed entries; LONG did so before
SHORT, LONG = [3, 1], [2, 7, 1, 7, 0, 5, 5, 6, 1, 0, 4]
PROMPTS = [[3, 1, 4, 1], [2, 7, 1, 7], [0, 0, 0, 5]]


def make_model(num_modules: int) -> Decoder:
  cfg = ModelConfig(
    vocab_size=VOCABULARY,
    d_model=16,
    num_layers=2,
    d_ff=24,
    mla=MLAConfig(num_heads=2, d_nope=8, d_rope=4, d_value=8, kv_rank=8),
    moe=MoEConfig(num_experts=4, top_k=2, d_expert=8),
    mtp=MTPConfig(num_modules=num_modules),
  )
  return Decoder(cfg, policy('float32'))


def where_of(token_BS) -> Where:
  token_BS = jnp.asarray(token_BS, jnp.int32)
  ones_BS = jnp.ones_like(token_BS)
  return Where(token_BS, jnp.cumsum(ones_BS, 1) - 1, ones_BS, ones_BS[:, 0] * 0)


def draw(model: Decoder, seed: int, edit=lambda name, a: a):
  """Variables on the current mesh, drawn by NumPy, each passed through `edit(name, array)`."""
  spread = lambda a: jax.device_put(a, sh.TOKENS if a.ndim == 2 else sh.BY_ROW)
  where = jax.tree.map(spread, where_of(np.zeros((4, 2))))
  like = jax.eval_shape(model.init, jax.random.key(0), where)

  def one(path, leaf):
    name = jax.tree_util.keystr(path)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    a = rng.normal(size=leaf.shape, scale=0.4).astype(np.float32)
    a = edit(name, np.ones_like(a) if 'weight_D' in name else a)
    return jax.device_put(a, leaf.sharding.spec)

  return jax.tree_util.tree_map_with_path(one, dict(like))


def simulate(model: Decoder, variables, prompt, ids, num_tokens: int) -> float:
  """The acceptance rate over `num_tokens`, from one full forward pass over a longer text."""
  K, text = model.cfg.mtp.num_modules, [*prompt, *ids]
  out = jax.jit(model.apply)(variables, kinds.where_of([text]))
  head = np.asarray(head_DV(variables['params'], model.policy))
  draft_KT = [np.argmax(np.asarray(h)[0] @ head, -1) for h in out.mtp_hidden]
  n, accepted, passes = len(prompt), 0, 0
  while n + 1 - len(prompt) < num_tokens:
    m = 0
    while m < K and draft_KT[m][n - 1] == text[n + 1 + m]:
      m += 1
    accepted, passes, n = accepted + m, passes + 1, n + m + 1
  return accepted / (passes * K)


@pytest.mark.slow
@pytest.mark.parametrize('num_modules', [1, 2])
def test_ids_are_greedy_decodings_and_the_rate_is_that_of_a_full_forward(num_modules):
  model, rates = make_model(num_modules), []
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), jax.default_matmul_precision('highest'):
    for seed, prompt in enumerate(PROMPTS):
      variables = draw(model, seed)
      want = generate(model, variables, prompt, num_tokens=20 + num_modules, temperature=0)
      got, rate = speculate(model, variables, prompt, 20)
      assert got == want[:20], seed
      # equal rates: no cache of a module holds what a refused draft left there
      assert rate == simulate(model, variables, prompt, want, 20), seed
      rates.append(rate)
  assert 0 < max(rates) < 1  # drafts of both fates were met


def tiny_model(kind: str, num_modules: int):
  """A model of an attention kind, or of all of DeepSeek-V4's, and its variables."""
  changes = dict(vocab_size=VOCABULARY, mtp=MTPConfig(num_modules=num_modules))
  if kind == 'v4':
    # three layers of one kind each, and few iterations: half the time to compile
    changes |= dict(num_layers=3, attention_per_layer=('sliding', 'csa', 'hca'))
    mhc = MHCConfig(init_scale=0.5, sinkhorn_iterations=2)
    return tiny_v4.make(dataclasses.replace(tiny_v4.CONFIG, mhc=mhc, **changes), rows=4, seed=1)
  base = kinds.tiny('dsa', **changes) if kind == 'full' else kinds.tiny(kind, **changes)
  model = Decoder(dataclasses.replace(base, attention=kind), policy('float32'))
  return model, draw(model, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'num_modules', 'prompt'),
  [('full', 1, LONG), ('dsa', 1, SHORT), ('nsa', 1, LONG), ('moba', 1, SHORT), ('v4', 1, LONG),
   ('v4', 2, SHORT)],
)  # fmt: skip
def test_every_attention_kind_writes_greedy_decodings_ids(kind, num_modules, prompt):
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), jax.default_matmul_precision('highest'):
    model, variables = tiny_model(kind, num_modules)
    want = generate(model, variables, prompt, num_tokens=30 + num_modules, temperature=0)
    got, rate = speculate(model, variables, prompt, 30)
    assert got == want[:30]
    # a cache that held what a refused draft left there would draft otherwise
    assert rate == simulate(model, variables, prompt, want, 30)
    assert 0 < rate < 1  # drafts of both fates were met


@pytest.mark.slow
def test_branches_of_every_length_are_sharded_alike_on_eight_devices():
  with jax.set_mesh(sh.make_mesh((2, 2, 2))):
    model, variables = tiny_model('v4', 2)
    prefill, step = _functions(model, jax.sharding.get_abstract_mesh(), 2, 9)
    state = jax.eval_shape(prefill, variables, jnp.zeros((2,), jnp.int32))
    after, _ = jax.eval_shape(step, variables, state)
  caches = lambda s: jax.tree.map(jax.typeof, (s.cache, s.draft_caches))
  assert caches(after) == caches(state)


def perfect(name: str, a: np.ndarray) -> np.ndarray:
  """Layers that add nothing, and modules that pass the next token's embedding on."""
  if any(end in name for end in ('out_HVD', 'down_EFD', 'down_FD')):
    return np.zeros_like(a)
  if 'join_XD' in name:
    return np.concatenate([np.eye(16), np.zeros((16, 16))]).astype(a.dtype)
  return a


@functools.cache
def perfect_on(mesh: tuple[int, int, int]):
  model = make_model(2)
  with jax.set_mesh(sh.make_mesh(mesh)), jax.default_matmul_precision('highest'):
    return speculate(model, draw(model, 0, perfect), PROMPTS[0], 11)


@pytest.mark.slow
def test_perfect_drafts_are_all_accepted():
  ids, rate = perfect_on((1, 1, 1))
  assert len(ids) == 11 and rate == 1


@pytest.mark.slow
def test_eight_devices_write_what_one_writes():
  assert perfect_on((2, 2, 2)) == perfect_on((1, 1, 1))


@pytest.mark.slow
def test_stop_id_ends_the_text():
  ids, _ = perfect_on((1, 1, 1))
  model = make_model(2)
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), jax.default_matmul_precision('highest'):
    cut, _ = speculate(model, draw(model, 0, perfect), PROMPTS[0], 11, stop_id=ids[3])
  assert cut == ids[: ids.index(ids[3]) + 1]


def test_a_model_without_modules_is_refused():
  with pytest.raises(ValueError, match=r'num_modules=0'):
    speculate(make_model(0), {}, [1], 4)


def test_a_prompt_without_tokens_is_refused():
  with pytest.raises(ValueError, match='prompt has 0 tokens'):
    speculate(make_model(1), {}, [], 4)
