"""Tiny models of every sparse attention kind, and ways to run them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding as sh
from moe_jax.config import DSAConfig, MoBAConfig, ModelConfig, NSAConfig
from moe_jax.infer.decode import extend, open_session
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Decoder, head_DV
from moe_jax.precision import policy

POLICY = policy('float32')
VOCABULARY = 40
# lengths at which a query sees fewer keys than it may choose, as many, and more
KINDS = {
  'dsa': dict(
    dsa=DSAConfig(
      num_heads=2, d_nope=8, d_rope=4, d_value=8, kv_rank=16, q_rank=16, num_index_heads=8,
      d_index=8, index_top_k=5,
    )
  ),
  'nsa': dict(
    nsa=NSAConfig(
      num_heads=4, num_kv_heads=2, d_head=8, d_value=6, compress_length=4, compress_stride=2,
      d_compress=8, select_length=4, top_blocks=3, window=3,
    )
  ),
  'moba': dict(
    moba=MoBAConfig(num_heads=4, num_kv_heads=2, d_head=8, d_value=6, block_size=4, top_k=1)
  ),
}  # fmt: skip


def where_of(ids, segment=None, position=None) -> Where:
  """A Where on the current mesh: one document a row, unless `segment` and `position` say more."""
  B, S = np.shape(ids)
  position = np.tile(np.arange(S), (B, 1)) if position is None else position
  segment = np.ones((B, S)) if segment is None else segment
  put = lambda a, spec: jax.device_put(np.asarray(a, np.int32), spec)
  return Where(*(put(a, sh.TOKENS) for a in (ids, position, segment)), put(np.zeros(B), sh.BY_ROW))


def tiny(kind: str, **changes) -> ModelConfig:
  settings = dict(
    vocab_size=VOCABULARY,
    d_model=16,
    num_layers=2,
    num_dense_layers=2,
    d_ff=24,
    attention=kind,
    init_std=0.3,
  )
  return ModelConfig(**(settings | KINDS[kind] | changes))


@functools.cache
def initial(cfg: ModelConfig):
  """Variables as NumPy arrays, the same on every mesh."""
  where = where_of(np.zeros((8, 2)))
  variables = jax.jit(Decoder(cfg, POLICY).init)(jax.random.key(0), where)
  return jax.tree.map(np.asarray, variables)


def on_mesh(cfg: ModelConfig, variables=None):
  """`initial` on the current mesh."""
  model = Decoder(cfg, POLICY)
  target = jax.eval_shape(model.init, jax.random.key(0), where_of(np.zeros((8, 2))))
  variables = initial(cfg) if variables is None else variables
  return jax.tree.map(lambda a, to: jax.device_put(a, to.sharding.spec), variables, target)


@functools.partial(jax.jit, static_argnums=0)
def logits_and_aux(cfg: ModelConfig, variables, where):
  out = Decoder(cfg, POLICY).apply(variables, where)
  head = head_DV(variables['params'], POLICY)
  return jnp.einsum('bsd,dv->bsv', out.hidden_BSD, head), out.aux


def logits(cfg: ModelConfig, variables, ids, segment=None, position=None) -> np.ndarray:
  where = where_of(np.asarray(ids), segment, position)
  return np.asarray(logits_and_aux(cfg, variables, where)[0])


def decoded(cfg: ModelConfig, variables, ids: np.ndarray, *, prompts: list[int], room: int):
  """Yields logits of all tokens, for each prompt: it is read at once, the others one by one."""
  step = jax.jit(functools.partial(extend, Decoder(cfg, POLICY)))
  for prompt in prompts:
    session = open_session(Decoder(cfg, POLICY), rows=ids.shape[0], length=room)
    parts = []
    for part in np.split(ids, np.arange(prompt, ids.shape[1]), axis=1):
      new, session = step(variables, session, where_of(part).token_BS)
      parts.append(np.asarray(new))
    yield np.concatenate(parts, axis=1)
