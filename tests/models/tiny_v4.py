"""A DeepSeek-V4 small enough to test with: every kind of layer, borders crossed often."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding as sh
from moe_jax.config import CompressedConfig, MHCConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Decoder, head_DV
from moe_jax.precision import policy

ROPE = RopeConfig(base=160_000.0, yarn_factor=16.0, yarn_original_length=64)
COMPRESSED = CompressedConfig(
  num_heads=4, d_head=16, d_rope=8, q_rank=12, window=5, num_groups=2, group_rank=8, csa_ratio=4,
  hca_ratio=8, num_index_heads=8, d_index=16, index_top_k=2, rope=ROPE,
)  # fmt: skip
CONFIG = ModelConfig(
  vocab_size=64,
  d_model=32,
  num_layers=4,
  num_dense_layers=0,
  attention='sliding',
  attention_per_layer=('sliding', 'csa', 'hca', 'csa'),
  residual='mhc',
  init_std=0.1,
  compressed=COMPRESSED,
  mhc=MHCConfig(init_scale=0.5),
  moe=MoEConfig(
    num_experts=8, top_k=2, d_expert=16, score='sqrt_softplus', weight_scale=1.5,
    num_hash_layers=1, swiglu_limit=0.3,
  ),
)  # fmt: skip


def make(cfg: ModelConfig = CONFIG, *, rows: int = 2, seed: int = 0):
  """A model and its variables on the current mesh, everything random that starts constant."""
  model = Decoder(cfg, policy('float32'))
  random = np.random.default_rng(seed)

  def draw(path, leaf):
    if leaf.dtype == jnp.int32:
      table = [random.permutation(cfg.moe.num_experts)[: leaf.shape[-1]] for _ in range(leaf.size)]
      values = np.array(table)[: leaf.size // leaf.shape[-1]].reshape(leaf.shape)
    else:
      norm = path[-1].key == 'weight_D'
      values = norm + (0.1 if norm else cfg.init_std) * random.standard_normal(leaf.shape)
    return jax.device_put(values.astype(leaf.dtype), leaf.sharding.spec)

  blank = whole(np.zeros((rows, 2)))
  shapes = jax.eval_shape(model.init, jax.random.key(0), blank)
  return model, jax.tree_util.tree_map_with_path(draw, shapes)


def place(tokens, positions, segments) -> Where:
  token_BS, position_BS, segment_BS = (
    jax.device_put(np.asarray(a, np.int32), sh.TOKENS) for a in (tokens, positions, segments)
  )
  return Where(token_BS, position_BS, segment_BS, jnp.zeros_like(token_BS[:, 0]))


def whole(tokens) -> Where:
  """Rows of one document each."""
  tokens = np.asarray(tokens)
  return place(tokens, np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), tokens * 0 + 1)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Decoder, variables, where: Where):
  with jax.default_matmul_precision('highest'):
    out = model.apply(variables, where)
    head = head_DV(variables['params'], model.policy)
    return jnp.einsum('bsd,dv->bsv', out.hidden_BSD, head), out.aux


def logits(model: Decoder, variables, where: Where) -> np.ndarray:
  return np.asarray(_logits(model, variables, where)[0])
