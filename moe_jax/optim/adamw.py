"""AdamW as the family trains with it: decay on matrices only, moments in float32 or bfloat16."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import OptimConfig
from moe_jax.optim.rounding import hashed_bits, stochastic_bfloat16
from moe_jax.optim.schedules import schedule

# of norms, attention sinks, and what hyper-connections add without looking at the streams
_KEPT = ('weight_D', 'sink_H', 'base_X', 'scale_3', 'base_J', 'scale_1')


def decays(params: Any) -> Any:
  """True for what weight decay applies to: matrices, not the scales and offsets named above."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in _KEPT, params)


def adamw(
  cfg: OptimConfig, steps: int, *, eps: float | None = None, seed: int = 0
) -> optax.GradientTransformation:
  """Source: arXiv:1711.05101. Gradients come in already clipped, in any dtype.

  Args:
    eps: instead of `optim.eps`.
    seed: of what moments in bfloat16 are rounded by.
  """
  eps = cfg.eps if eps is None else eps
  scale = optax.scale_by_adam(cfg.b1, cfg.b2, eps)
  if cfg.moments_dtype != 'float32':
    scale = _scale_by_bfloat16_adam(cfg, eps, seed)
  return optax.chain(
    scale,
    optax.add_decayed_weights(cfg.weight_decay, decays),
    optax.scale_by_learning_rate(schedule(cfg, steps)),
  )


def _scale_by_bfloat16_adam(
  cfg: OptimConfig, eps: float, seed: int
) -> optax.GradientTransformation:
  """`optax.scale_by_adam` with moments that are bfloat16 between steps and float32 within one.

  With b2 = 0.95 a step changes a moment by up to 5%, a bfloat16 by 0.4%: rounding to nearest would
  stop where a moment moves by less than 0.2% of itself, rounding by chance does not. What is drawn
  is a function of the seed, the count of updates, and the place.
  """

  def init(params: Any) -> optax.ScaleByAdamState:
    zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, jnp.bfloat16), params)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

  def update(grads: Any, state: Any, params: Any = None):
    del params
    count = jnp.asarray(optax.safe_increment(state.count))
    correct_1, correct_2 = (1 - b ** count.astype(jnp.float32) for b in (cfg.b1, cfg.b2))

    def one(number: int, g: jax.Array, mu: jax.Array, nu: jax.Array):
      g, mu, nu = (a.astype(jnp.float32) for a in (g, mu, nu))
      mu = cfg.b1 * mu + (1 - cfg.b1) * g
      nu = cfg.b2 * nu + (1 - cfg.b2) * jnp.square(g)
      direction = (mu / correct_1) / (jnp.sqrt(nu / correct_2) + eps)
      if cfg.moments_rounding == 'nearest':
        return direction, mu.astype(jnp.bfloat16), nu.astype(jnp.bfloat16)
      # every leaf and every step draws anew; the odd constants only set them apart
      of_leaf = jnp.uint32((seed * 0x9E3779B1 + number * 0xC2B2AE3D) % 2**32)
      bits = hashed_bits(g, of_leaf + count.astype(jnp.uint32) * jnp.uint32(0x85EBCA77))
      return direction, stochastic_bfloat16(mu, bits), stochastic_bfloat16(nu, bits >> 16)

    leaves, tree = jax.tree.flatten(grads)
    moments = zip(leaves, jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True)
    new = [one(number, *parts) for number, parts in enumerate(moments)]
    direction, mu, nu = (jax.tree.unflatten(tree, part) for part in zip(*new, strict=True))
    return direction, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
