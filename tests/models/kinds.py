"""Tiny models of every sparse attention kind, and ways to run them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from v32_checkpoint import POLICY, where_of

from moe_jax.config import DSAConfig, MoBAConfig, ModelConfig, MoEConfig, NSAConfig
from moe_jax.infer.decode import extend, open_session
from moe_jax.models.decoder import Decoder, head_DV

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


def tiny(kind: str, **changes) -> ModelConfig:
  settings = dict(
    vocab_size=VOCABULARY,
    d_model=16,
    num_layers=2,
    num_dense_layers=1,
    d_ff=24,
    attention=kind,
    init_std=0.3,
    moe=MoEConfig(num_experts=4, top_k=2, d_expert=8),
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


def decoded(cfg: ModelConfig, variables, ids: np.ndarray, *, prompt: int, room: int) -> np.ndarray:
  """Logits of all tokens: the first `prompt` read at once, the others one by one."""
  model = Decoder(cfg, POLICY)
  step = jax.jit(functools.partial(extend, model))
  session = open_session(model, rows=ids.shape[0], length=room)
  parts = []
  for part in np.split(ids, np.arange(prompt, ids.shape[1]), axis=1):
    new, session = step(variables, session, where_of(part).token_BS)
    parts.append(np.asarray(new))
  return np.concatenate(parts, axis=1)
