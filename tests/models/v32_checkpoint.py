"""Reads a tiny published DeepSeek-V3.2 checkpoint for tests, by the published names."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding as sh
from moe_jax.config import DSAConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Block, Decoder, head_DV
from moe_jax.models.grouping import group_layers
from moe_jax.precision import policy

GOLDEN = Path(__file__).parent.parent / 'golden'
POLICY = policy('float32')


def read_tensors(path: Path) -> dict[str, np.ndarray]:
  raw = path.read_bytes()
  size = int.from_bytes(raw[:8], 'little')
  header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
  header.pop('__metadata__', None)
  assert all(entry['dtype'] == 'F32' for entry in header.values())
  return {
    name: np.frombuffer(body[slice(*entry['data_offsets'])], np.float32).reshape(entry['shape'])
    for name, entry in header.items()
  }


def model_config(h: dict) -> ModelConfig:
  rope = h['rope_parameters']
  yarn = {}
  if rope['rope_type'] == 'yarn':
    yarn = dict(
      yarn_factor=float(rope['factor']),
      yarn_original_length=rope['original_max_position_embeddings'],
      yarn_beta_fast=float(rope['beta_fast']),
      yarn_beta_slow=float(rope['beta_slow']),
      yarn_mscale_all_dim=rope['mscale_all_dim'],
    )
  return ModelConfig(
    vocab_size=h['vocab_size'],
    d_model=h['hidden_size'],
    num_layers=h['num_hidden_layers'],
    num_dense_layers=h['first_k_dense_replace'],
    d_ff=h['intermediate_size'],
    attention='dsa',
    norm_eps=h['rms_norm_eps'],
    rope=RopeConfig(base=rope['rope_theta'], **yarn),
    dsa=DSAConfig(
      num_heads=h['num_attention_heads'],
      d_nope=h['qk_nope_head_dim'],
      d_rope=h['qk_rope_head_dim'],
      d_value=h['v_head_dim'],
      kv_rank=h['kv_lora_rank'],
      q_rank=h['q_lora_rank'],
      num_index_heads=h['index_n_heads'],
      d_index=h['index_head_dim'],
      index_top_k=h['index_topk'],
    ),
    moe=MoEConfig(
      num_experts=h['n_routed_experts'],
      top_k=h['num_experts_per_tok'],
      d_expert=h['moe_intermediate_size'],
      num_shared=h['n_shared_experts'],
      num_groups=h['n_group'],
      top_groups=h['topk_group'],
      normalize_weights=h['norm_topk_prob'],
      weight_scale=h['routed_scaling_factor'],
    ),
  )


def layer_params(t: dict[str, np.ndarray], m: ModelConfig, i: int) -> tuple[dict, dict]:
  """Parameters and router variables of layer i."""
  c, at = m.dsa, f'model.layers.{i}.'
  get = lambda name: t[f'{at}{name}.weight'].T
  heads = lambda name: get(name).reshape(
    -1, c.num_heads, t[f'{at}{name}.weight'].shape[0] // c.num_heads
  )
  norm = lambda name: {'weight_D': get(name)}
  feed = lambda name: {f'{w}_{s}': get(f'{name}.{w}_proj') for w, s in FEED_FORWARD}
  FEED_FORWARD = (('gate', 'DF'), ('up', 'DF'), ('down', 'FD'))
  kv = heads('self_attn.kv_b_proj')
  index = 'self_attn.indexer'
  attention = {
    'kv_down_DX': get('self_attn.kv_a_proj_with_mqa'),
    'kv_norm': norm('self_attn.kv_a_layernorm'),
    'key_up_RHN': kv[..., : c.d_nope],
    'value_up_RHV': kv[..., c.d_nope :],
    'out_HVD': get('self_attn.o_proj').reshape(c.num_heads, c.d_value, -1),
    'q_down_DQ': get('self_attn.q_a_proj'),
    'q_norm': norm('self_attn.q_a_layernorm'),
    'q_up_QHX': heads('self_attn.q_b_proj'),
    'indexer': {
      'query_QJI': get(f'{index}.wq_b').reshape(-1, c.num_index_heads, c.d_index),
      'key_DI': get(f'{index}.wk'),
      'head_DJ': get(f'{index}.weights_proj'),
      'k_norm': {'bias_D': t[f'{at}{index}.k_norm.bias'], **norm(f'{index}.k_norm')},
    },
  }
  params = {
    'attention': attention,
    'attention_norm': norm('input_layernorm'),
    'feed_forward_norm': norm('post_attention_layernorm'),
  }
  if m.layers[i].feed_forward == 'dense':
    return params | {'dense': feed('mlp')}, {}
  stack = lambda kind: np.stack(
    [get(f'mlp.experts.{e}.{kind}_proj') for e in range(m.moe.num_experts)]
  )
  moe = {
    'router_DE': get('mlp.gate'),
    'gate_up_ED2F': np.stack([stack('gate'), stack('up')], axis=2),
    'down_EFD': stack('down'),
    'shared': feed('mlp.shared_experts'),
  }
  return params | {'moe': moe}, {'moe': {'bias_E': t[f'{at}mlp.gate.e_score_correction_bias']}}


def load(folder: Path) -> tuple[ModelConfig, dict]:
  """The config and the Decoder's variables on the current mesh."""
  m = model_config(json.loads((folder / 'config.json').read_text()))
  t = read_tensors(folder / 'model.safetensors')
  layers = [layer_params(t, m, i) for i in range(m.num_layers)]
  params = {
    'embedding_VD': t['model.embed_tokens.weight'],
    'head_DV': t['lm_head.weight'].T,
    'final_norm': {'weight_D': t['model.norm.weight']},
  }
  router, at = {}, 0
  for g, (pattern, repeats) in enumerate(group_layers(m.layers)):
    width = len(pattern)
    for part, target in ((0, params), (1, router)):
      target[f'group_{g}'] = {
        f'layer_{j}': jax.tree.map(
          lambda *a: np.stack(a), *(layers[at + r * width + j][part] for r in range(repeats))
        )
        for j in range(width)
      }
    if not jax.tree.leaves(router[f'group_{g}']):
      del router[f'group_{g}']
    at += width * repeats
  target = jax.eval_shape(Decoder(m, POLICY).init, jax.random.key(0), where_of(np.zeros((8, 2))))
  return m, jax.tree.map(
    lambda a, to: jax.device_put(a, to.sharding.spec),
    {'params': params, 'router': router},
    dict(target),
  )


def where_of(
  ids: np.ndarray, segment: np.ndarray | None = None, position: np.ndarray | None = None
):
  """A Where on the current mesh: one document a row, unless `segment` and `position` say more."""
  B, S = ids.shape
  position = np.tile(np.arange(S), (B, 1)) if position is None else position
  segment = np.ones((B, S)) if segment is None else segment
  put = lambda a, spec: jax.device_put(np.asarray(a, np.int32), spec)
  return Where(*(put(a, sh.TOKENS) for a in (ids, position, segment)), put(np.zeros(B), sh.BY_ROW))


def run_logits(m: ModelConfig, variables: dict, where: Where) -> jax.Array:
  model = Decoder(m, POLICY)
  out = model.apply(variables, where)
  return jnp.einsum('bsd,dv->bsv', out.hidden_BSD, head_DV(variables['params'], POLICY))


def run_layers(m: ModelConfig, variables: dict, where: Where) -> list[jax.Array]:
  """The residual stream entering every layer, computed layer by layer."""
  table_VD = jax.sharding.reshard(variables['params']['embedding_VD'], jax.P(None, None))
  x_BSD, streams = table_VD.at[where.token_BS].get(out_sharding=sh.STREAM), []
  for g, (pattern, repeats) in enumerate(group_layers(m.layers)):
    for r in range(repeats):
      for j, kind in enumerate(pattern):
        streams.append(x_BSD)
        layer = {
          part: jax.tree.map(lambda a: a[r], tree.get(f'group_{g}', {}).get(f'layer_{j}', {}))  # noqa: B023
          for part, tree in variables.items()
        }
        x_BSD, _, _ = Block(kind, m, (), POLICY).apply(layer, x_BSD, where, None)
  return streams
