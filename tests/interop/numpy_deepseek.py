"""DeepSeek V1 to V3.2 in NumPy float64, from a published config.json and tensors by published name.

Written from the papers and apart from moe_jax: it knows nothing of our names or layouts.
"""

import math

import numpy as np

# T tokens of one sequence  D model  H heads

SIGMOID = ('deepseek_v3', 'deepseek_v32')  # the router's scores


def tensor_shapes(c):
  """Every tensor that a checkpoint of config `c` has, by name."""
  D, V, H = c['hidden_size'], c['vocab_size'], c['num_attention_heads']
  shapes = {
    'model.embed_tokens.weight': (V, D),
    'lm_head.weight': (V, D),
    'model.norm.weight': (D,),
  }

  def mlp(prefix, width):
    for name in ('gate', 'up'):
      shapes[f'{prefix}{name}_proj.weight'] = (width, D)
    shapes[f'{prefix}down_proj.weight'] = (D, width)

  for i in range(c['num_hidden_layers']):
    layer = f'model.layers.{i}.'
    attention = layer + 'self_attn.'
    shapes[layer + 'input_layernorm.weight'] = shapes[layer + 'post_attention_layernorm.weight'] = (
      D,
    )
    if c['model_type'] == 'deepseek':
      for name in 'qkvo':
        shapes[f'{attention}{name}_proj.weight'] = (D, D)
    else:
      n, r, v = c['qk_nope_head_dim'], c['qk_rope_head_dim'], c['v_head_dim']
      if c['q_lora_rank']:
        shapes[attention + 'q_a_proj.weight'] = (c['q_lora_rank'], D)
        shapes[attention + 'q_a_layernorm.weight'] = (c['q_lora_rank'],)
        shapes[attention + 'q_b_proj.weight'] = (H * (n + r), c['q_lora_rank'])
      else:
        shapes[attention + 'q_proj.weight'] = (H * (n + r), D)
      shapes[attention + 'kv_a_proj_with_mqa.weight'] = (c['kv_lora_rank'] + r, D)
      shapes[attention + 'kv_a_layernorm.weight'] = (c['kv_lora_rank'],)
      shapes[attention + 'kv_b_proj.weight'] = (H * (n + v), c['kv_lora_rank'])
      shapes[attention + 'o_proj.weight'] = (D, H * v)
      if 'index_topk' in c:
        J, I = c['index_n_heads'], c['index_head_dim']
        shapes[attention + 'indexer.wq_b.weight'] = (J * I, c['q_lora_rank'])
        shapes[attention + 'indexer.wk.weight'] = (I, D)
        shapes[attention + 'indexer.k_norm.weight'] = shapes[attention + 'indexer.k_norm.bias'] = (
          I,
        )
        shapes[attention + 'indexer.weights_proj.weight'] = (J, D)
    if i < c['first_k_dense_replace']:
      mlp(layer + 'mlp.', c['intermediate_size'])
      continue
    shapes[layer + 'mlp.gate.weight'] = (c['n_routed_experts'], D)
    if c['model_type'] in SIGMOID:
      shapes[layer + 'mlp.gate.e_score_correction_bias'] = (c['n_routed_experts'],)
    for e in range(c['n_routed_experts']):
      mlp(f'{layer}mlp.experts.{e}.', c['moe_intermediate_size'])
    mlp(layer + 'mlp.shared_experts.', c['n_shared_experts'] * c['moe_intermediate_size'])
  return shapes


def forward(c, tensors, ids):
  """Logits [B, S, V] and the residual stream entering each layer, [B, S, D] each, float64."""
  rows = [_row(c, tensors, row) for row in np.asarray(ids)]
  return np.stack([r[0] for r in rows]), [
    np.stack(h) for h in zip(*(r[1] for r in rows), strict=True)
  ]


def _row(c, tensors, ids):
  w = lambda name: tensors[f'{name}.weight'].astype(np.float64)
  eps = c['rms_norm_eps']
  x, entering = w('model.embed_tokens')[ids], []
  for i in range(c['num_hidden_layers']):
    entering.append(x)
    layer = f'model.layers.{i}.'
    attend = _full_attention if c['model_type'] == 'deepseek' else _latent_attention
    h = _norm(x, w(layer + 'input_layernorm'), eps)
    own = lambda name, p=layer: w(f'{p}self_attn.{name}')
    bias = tensors.get(f'{layer}self_attn.indexer.k_norm.bias')
    x = x + attend(c, own, h, **({} if bias is None else {'index_bias': bias}))
    h = _norm(x, w(layer + 'post_attention_layernorm'), eps)
    if i < c['first_k_dense_replace']:
      x = x + _mlp(lambda name, p=layer: w(f'{p}mlp.{name}'), h)
    else:
      bias = tensors.get(layer + 'mlp.gate.e_score_correction_bias', np.zeros(()))
      x = x + _moe(c, lambda name, p=layer: w(f'{p}mlp.{name}'), bias, h)
  return _norm(x, w('model.norm'), eps) @ w('lm_head').T, entering


def _norm(x, weight, eps):
  return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def _mlp(w, x):
  gate = x @ w('gate_proj').T
  return (gate / (1 + np.exp(-gate)) * (x @ w('up_proj').T)) @ w('down_proj').T


def _moe(c, w, bias, x):
  logits, K = x @ w('gate').T, c['num_experts_per_tok']
  if c['model_type'] in SIGMOID:
    score, best = 1 / (1 + np.exp(-logits)), 2
  else:
    score, best = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), 1
  y = _mlp(lambda name: w(f'shared_experts.{name}'), x)
  groups = 1 if c.get('topk_method') == 'greedy' else c.get('n_group') or 1
  for t in range(len(x)):
    choice = (score[t] + bias).reshape(groups, -1)
    worth = np.sort(choice, -1)[:, -best:].sum(-1)
    kept = np.argsort(-worth)[: c.get('topk_group') or 1]
    masked = np.full_like(choice, -np.inf)
    masked[kept] = choice[kept]
    chosen = np.argsort(-masked.reshape(-1))[:K]
    gate = score[t, chosen]
    if c.get('norm_topk_prob'):
      gate = gate / gate.sum()
    for e, g in zip(chosen, gate * c.get('routed_scaling_factor', 1.0), strict=True):
      y[t] += g * _mlp(lambda name, e=e: w(f'experts.{e}.{name}'), x[t])
  return y


def _attend(q, k, v, scale, seen=True):
  """[T, H, .] each; causal, and no further than `seen` [T, T] lets."""
  score = np.einsum('thc,shc->hts', q, k) * scale
  score = np.where(np.tri(len(q), dtype=bool) & seen, score, -np.inf)
  p = np.exp(score - score.max(-1, keepdims=True))
  return np.einsum('hts,shv->thv', p / p.sum(-1, keepdims=True), v).reshape(len(q), -1)


def _full_attention(c, w, x):
  H = c['num_attention_heads']
  q, k, v = ((x @ w(f'{n}_proj').T).reshape(len(x), H, -1) for n in 'qkv')
  C = q.shape[-1]
  turn = np.exp(1j * np.outer(np.arange(len(x)), _frequencies(c, C)[0]))[:, None]

  def rotate(a):
    z = (a[..., : C // 2] + 1j * a[..., C // 2 :]) * turn
    return np.concatenate([z.real, z.imag], -1)

  return _attend(rotate(q), rotate(k), v, C**-0.5) @ w('o_proj').T


def _latent_attention(c, w, x, index_bias=None):
  T, H, N = len(x), c['num_attention_heads'], c['qk_nope_head_dim']
  C, R = c['qk_rope_head_dim'], c['kv_lora_rank']
  if c['q_lora_rank']:
    c_q = _norm(x @ w('q_a_proj').T, w('q_a_layernorm'), 1e-6)
    q = c_q @ w('q_b_proj').T
  else:
    q = x @ w('q_proj').T
  q = q.reshape(T, H, N + C)
  latent, k_rope = np.split(x @ w('kv_a_proj_with_mqa').T, [R], -1)
  kv = (_norm(latent, w('kv_a_layernorm'), 1e-6) @ w('kv_b_proj').T).reshape(T, H, -1)
  frequency, magnitude, softmax = _frequencies(c, C)
  turn = magnitude * np.exp(1j * np.outer(np.arange(T), frequency))[:, None]

  def rotate(a):
    z = (a[..., 0::2] + 1j * a[..., 1::2]) * turn
    return np.stack([z.real, z.imag], -1).reshape(a.shape)

  q = np.concatenate([q[..., :N], rotate(q[..., N:])], -1)
  k_rope = np.broadcast_to(rotate(k_rope[:, None]), (T, H, C))
  k = np.concatenate([kv[..., :N], k_rope], -1)
  seen = True if index_bias is None else _indexed(c, w, x, c_q, index_bias, turn)
  return _attend(q, k, kv[..., N:], (N + C) ** -0.5 * softmax, seen) @ w('o_proj').T


def _indexed(c, w, x, c_q, bias, turn):
  """Which keys each query sees: the index_topk of the highest index scores."""
  T, J, C = len(x), c['index_n_heads'], c['qk_rope_head_dim']
  k = x @ w('indexer.wk').T
  k = k - k.mean(-1, keepdims=True)
  k = k / np.sqrt((k * k).mean(-1, keepdims=True) + 1e-6) * w('indexer.k_norm') + bias

  def rotate(a):
    z = (a[..., : C // 2] + 1j * a[..., C // 2 : C]) * turn
    return np.concatenate([z.real, z.imag, a[..., C:]], -1)

  q = rotate((c_q @ w('indexer.wq_b').T).reshape(T, J, -1))
  dot = np.maximum(np.einsum('tji,si->tsj', q, rotate(k[:, None])[:, 0]), 0)
  score = np.einsum('tsj,tj->ts', dot, x @ w('indexer.weights_proj').T)
  seen = np.zeros((T, T), bool)
  for t in range(T):
    order = np.argsort(-score[t, : t + 1], kind='stable')  # of equal scores, the earliest
    seen[t, order[: c['index_topk']]] = True
  return seen


def _frequencies(c, width):
  """Radians a position of each pair, what cos and sin, and what the softmax is multiplied by."""
  rope = c.get('rope_parameters') or c.get('rope_scaling') or {}
  base = rope.get('rope_theta', c.get('rope_theta', 10_000.0))
  f = base ** (-np.arange(0, width, 2) / width)
  if rope.get('rope_type', rope.get('type', 'default')) == 'default':
    return f, 1.0, 1.0
  s, L = rope['factor'], rope['original_max_position_embeddings']
  pair = lambda turns: width * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(base))
  low = max(math.floor(pair(rope.get('beta_fast', 32))), 0)
  high = min(math.ceil(pair(rope.get('beta_slow', 1))), width - 1)
  ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
  m, all_dim = rope.get('mscale', 0), rope.get('mscale_all_dim', 0)
  size = lambda m: 0.1 * m * math.log(s) + 1
  magnitude = size(m) / size(all_dim) if m and all_dim else size(1)
  return f * (1 - ramp) + f / s * ramp, magnitude, size(all_dim) ** 2
