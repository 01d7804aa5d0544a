"""Gate, scores, group limits and top-k choice of experts; hash tables that choose by token id."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_jax.ops import pallas_triton
from moe_jax.ops.route import reference, triton
from moe_jax.ops.route.gate import gate_logits
from moe_jax.ops.route.hash_table import hash_table
from moe_jax.ops.route.reference import keep_top_groups, scores, weigh

__all__ = [
  'choose_experts',
  'gate_logits',
  'hash_table',
  'keep_top_groups',
  'scores',
  'top_k_route',
  'weigh',
]

# E experts  K experts a token; leading dims are tokens


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
  implementation: str | None = None,
) -> tuple[Int[Array, '... k'], Float[Array, '... k']]:
  """Experts of every token and their weights: the biased score chooses, the raw one weighs.

  Args:
    implementation: 'triton', one pass over the scores, or 'xla'. None takes the fastest that can.

  Source: arXiv:2412.19437, equations 12 to 16 (V3); arXiv:2405.04434, section 2.1.3 (V2).
  """
  limits: Any = dict(num_groups=num_groups, top_groups=top_groups, group_score=group_score)
  expert_K = choose_experts(score_E, bias_E, k=k, implementation=implementation, **limits)
  expert_K = checkpoint_name(expert_K, 'router_choice')
  return expert_K, weigh(score_E, expert_K, normalize=normalize, scale=scale)


@jax.named_scope('choose')
def choose_experts(
  score_E: Float[Array, '... E'],
  bias_E: Float[Array, 'E'] | None = None,
  *,
  k: int,
  num_groups: int = 1,
  top_groups: int = 1,
  group_score: str = 'top2',
  implementation: str | None = None,
) -> Int[Array, '... k']:
  """The k largest of score + bias within the best groups, largest first; of equals, the first."""
  limits: Any = dict(k=k, num_groups=num_groups, top_groups=top_groups, group_score=group_score)
  problem = triton.unsupported(score_E.shape[-1], k)
  if bias_E is None:
    bias_E = jnp.zeros(score_E.shape[-1], jnp.float32)
  score, bias_E = jax.lax.stop_gradient(score_E), jax.lax.stop_gradient(bias_E)
  if pallas_triton.choose('top_k_route', implementation, problem) == 'triton':
    return _on_each_device(limits, score, bias_E)
  return reference.choose(score, bias_E, **limits)


def _on_each_device(limits: dict[str, Any], score_E: jax.Array, bias_E: jax.Array) -> jax.Array:
  def run(score_E: jax.Array, bias_E: jax.Array) -> jax.Array:
    *lead, num_experts = score_E.shape
    expert_TK = triton.choose(score_E.reshape(-1, num_experts), bias_E, **limits)
    return expert_TK.reshape(*lead, -1)

  sharding = jax.typeof(score_E).sharding
  if sharding.mesh.empty or sharding.mesh.are_all_axes_manual:
    return run(score_E, bias_E)
  # integers carry no gradient, so how they vary over the mesh need not be known
  specs = (sharding.spec, P(None))
  return jax.shard_map(run, in_specs=specs, out_specs=sharding.spec, check_vma=False)(
    score_E, bias_E
  )
