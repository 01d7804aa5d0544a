"""How experts are chosen and weighed; what keeps them balanced is in moe_jax.routing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def choose(
  score_E: Float[Array, '... E'],
  bias_E: Float[Array, 'E'],
  *,
  k: int,
  num_groups: int,
  top_groups: int,
  group_score: str,
) -> Int[Array, '... k']:
  """The k largest of score + bias within the best groups, largest first; of equals, the first."""
  limits: Any = dict(num_groups=num_groups, top_groups=top_groups, group_score=group_score)
  return jax.lax.top_k(keep_top_groups(score_E + bias_E, **limits), k)[1]


def weigh(
  score_E: Float[Array, '... E'], expert_K: Int[Array, '... k'], *, normalize: bool, scale: float
) -> Float[Array, '... k']:
  """Weights of the chosen experts: their scores, to sum to one if `normalize`, times `scale`."""
  weight_K = _take(score_E, expert_K)
  if normalize:
    weight_K = weight_K / (weight_K.sum(-1, keepdims=True) + 1e-20)
  return weight_K * scale


@jax.custom_vjp
def _take(score_E: jax.Array, expert_K: jax.Array) -> jax.Array:
  return jnp.take_along_axis(score_E, expert_K, axis=-1)


def _take_forward(score_E, expert_K):
  return _take(score_E, expert_K), (expert_K, score_E.shape[-1])


def _take_backward(kept, dweight_K):
  # a comparison with every expert, which fuses, for the scatter of the usual gradient
  expert_K, num_experts = kept
  chosen_KE = expert_K[..., None] == jnp.arange(num_experts)
  dscore_E = jnp.where(chosen_KE, dweight_K[..., None], 0).sum(-2)
  return dscore_E, np.zeros(expert_K.shape, jax.dtypes.float0)


_take.defvjp(_take_forward, _take_backward)
