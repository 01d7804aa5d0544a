"""How experts are chosen and weighed; what keeps them balanced is in moe_jax.routing."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# E experts  G groups  K experts a token; leading dims are tokens


def scores(logits_E: Float[Array, '... E'], kind: str) -> Float[Array, '... E']:
  """Affinity of a token for each expert, float32.

  `softmax` (V1, V2), `sigmoid` (V3) or `sqrt_softplus` (V4).
  """
  logits_E = logits_E.astype(jnp.float32)
  match kind:
    case 'softmax':
      return jax.nn.softmax(logits_E, axis=-1)
    case 'sigmoid':
      return jax.nn.sigmoid(logits_E)
    case 'sqrt_softplus':
      return jnp.sqrt(jax.nn.softplus(logits_E))
  raise ValueError(f'score={kind!r} is not one of softmax, sigmoid, sqrt_softplus.')


def keep_top_groups(
  choice_E: Float[Array, '... E'], *, num_groups: int, top_groups: int, group_score: str
) -> Float[Array, '... E']:
  """Sets experts outside a token's best groups to -inf.

  A group's score is its largest choice score (`max`: V2, group_limited_greedy) or the sum of its
  two largest (`top2`: V3).
  """
  if top_groups == num_groups:
    return choice_E
  grouped = choice_E.reshape(*choice_E.shape[:-1], num_groups, -1)
  best = jax.lax.top_k(grouped, 1 if group_score == 'max' else 2)[0].sum(-1)
  _, kept = jax.lax.top_k(best, top_groups)
  keep_G = jax.nn.one_hot(kept, num_groups, dtype=jnp.bool_).any(-2)
  return jnp.where(keep_G[..., None], grouped, -jnp.inf).reshape(choice_E.shape)


def top_k_route(
  score_E: Float[Array, '... E'],
  bias_E: Float[Array, 'E'],
  *,
  k: int,
  num_groups: int = 1,
  top_groups: int = 1,
  group_score: str = 'top2',
  normalize: bool = True,
  scale: float = 1.0,
) -> tuple[Int[Array, '... k'], Float[Array, '... k']]:
  """Experts of every token and their weights: the biased score chooses, the raw one weighs.

  Source: arXiv:2412.19437, equations 12 to 16 (V3); arXiv:2405.04434, section 2.1.3 (V2).
  """
  choice_E = keep_top_groups(
    score_E + jax.lax.stop_gradient(bias_E),
    num_groups=num_groups,
    top_groups=top_groups,
    group_score=group_score,
  )
  _, expert_K = jax.lax.top_k(choice_E, k)
  expert_K = checkpoint_name(expert_K, 'router_choice')
  return expert_K, weigh(score_E, expert_K, normalize=normalize, scale=scale)


def weigh(
  score_E: Float[Array, '... E'], expert_K: Int[Array, '... k'], *, normalize: bool, scale: float
) -> Float[Array, '... k']:
  """Weights of the chosen experts: their scores, to sum to one if `normalize`, times `scale`."""
  weight_K = jnp.take_along_axis(score_E, expert_K, axis=-1)
  if normalize:
    weight_K = weight_K / (weight_K.sum(-1, keepdims=True) + 1e-20)
  return weight_K * scale
