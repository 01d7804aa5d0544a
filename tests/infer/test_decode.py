"""Decoding with a cache is the full forward pass, however the tokens come in."""

# B rows  S tokens  V vocabulary

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.config import FullAttentionConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.infer.decode import extend, generate, open_session
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Decoder, empty_cache, head_DV
from moe_jax.precision import policy

pytestmark = pytest.mark.slow

B, S, V = 2, 11, 40
MODELS = {
  kind: ModelConfig(
    vocab_size=V,
    d_model=16,
    num_layers=2,
    d_ff=16,
    attention=kind,
    full=FullAttentionConfig(num_heads=2, d_head=8),
    mla=MLAConfig(num_heads=2, d_nope=8, d_rope=4, d_value=6, kv_rank=8, q_rank=8),
    moe=MoEConfig(num_experts=4, top_k=2, d_expert=8),
    rope=RopeConfig(yarn_factor=4.0, yarn_original_length=8),
  )
  for kind in ('mla', 'full')
}
EACH = pytest.mark.parametrize('kind', MODELS)


@pytest.fixture(autouse=True)
def on_one_device():
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), jax.default_matmul_precision('highest'):
    yield


def make_model(kind):
  return Decoder(MODELS[kind], policy('float32'))


def make_tokens():
  token_BS = np.random.default_rng(0).integers(0, V, (B, S)).astype(np.int32)
  return jax.device_put(token_BS, sh.TOKENS)


@functools.cache
def variables(kind):
  token_BS = make_tokens()
  start_B = jax.device_put(jnp.zeros(B, jnp.int32), sh.BY_ROW)
  where = Where(token_BS, token_BS, token_BS, start_B)
  shapes = jax.eval_shape(make_model(kind).init, jax.random.key(0), where)
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'weight_D' else 0.0
    return jax.device_put(rng.normal(mean, 0.25, leaf.shape).astype(np.float32), leaf.sharding.spec)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def full_logits(kind):
  """[B, S, V] without a cache."""

  @jax.jit
  def run(values, token_BS):
    position_BS = jnp.broadcast_to(jnp.arange(S), (B, S), out_sharding=sh.TOKENS)
    start_B = jnp.zeros_like(token_BS[:, 0])
    where = Where(token_BS, position_BS, jnp.ones_like(token_BS), start_B)
    out = make_model(kind).apply(values, where)
    return jnp.einsum('bsd,dv->bsv', out.hidden_BSD, head_DV(values['params'], policy('float32')))

  return np.asarray(run(variables(kind), make_tokens()))


@functools.cache
def compiled(kind):
  return jax.jit(functools.partial(extend, make_model(kind)))


def decode(kind, pieces):
  """Logits of all tokens, read in pieces of the given lengths."""
  session, out, at = open_session(make_model(kind), rows=B, length=S), [], 0
  token_BS = make_tokens()
  for length in pieces:
    logits_BSV, session = compiled(kind)(variables(kind), session, token_BS[:, at : at + length])
    out.append(np.asarray(logits_BSV))
    at += length
  np.testing.assert_array_equal(session.length_B, [at] * B)
  return np.concatenate(out, axis=1)


@EACH
@pytest.mark.parametrize(
  'pieces', [[S], [5, 6], [5, 1, 1, 1, 1, 1, 1]], ids=['at_once', 'in_two', 'then_one_by_one']
)
def test_cached_logits_equal_the_full_forward(kind, pieces):
  # logits of order 1; MLA multiplies its matrices in another order with a cache
  np.testing.assert_allclose(decode(kind, pieces), full_logits(kind), atol=1e-5)


def test_the_test_models_logits_are_of_order_one():
  for kind in MODELS:
    assert 0.3 < full_logits(kind).std() < 30


def test_mla_caches_latents_and_not_heads():
  cfg = MODELS['mla']
  [[first], [second]] = empty_cache(cfg, batch=B, length=S, dtype=jnp.float32)
  for cache in (first, second):
    numbers = sum(a.size for a in jax.tree.leaves(cache))
    assert numbers == B * S * (cfg.mla.kv_rank + cfg.mla.d_rope)


@EACH
def test_greedy_generation_takes_the_likeliest_token_each_time(kind):
  prompt = np.asarray(make_tokens())[0, :5].tolist()
  new = generate(make_model(kind), variables(kind), prompt, num_tokens=4, temperature=0.0)
  assert len(new) == 4
  text = prompt + new
  padded = np.zeros((B, S), np.int32)
  padded[0, : len(text)] = text
  session = open_session(make_model(kind), rows=B, length=S)
  token_BS = jax.device_put(padded, sh.TOKENS)
  logits_BSV, _ = compiled(kind)(variables(kind), session, token_BS)
  np.testing.assert_array_equal(np.argmax(logits_BSV[0, 4:8], -1), new)


def test_generation_of_nothing_or_from_nothing():
  model, values = make_model('mla'), variables('mla')
  assert generate(model, values, [1], num_tokens=0) == []
  with pytest.raises(ValueError, match='prompt has no tokens'):
    generate(model, values, [], num_tokens=3)


def test_generation_depends_on_its_seed_alone_and_ends_after_the_stop_id():
  model, values = make_model('mla'), variables('mla')
  run = functools.partial(generate, model, values, [1, 2, 3], num_tokens=8)
  first = run(seed=0)
  assert run(seed=0) == first
  stop_id = first[3]
  assert run(seed=0, stop_id=stop_id) == first[: first.index(stop_id) + 1]
