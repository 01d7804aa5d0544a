"""Triton kernel that chooses experts: all the scores of some tokens in registers, read once.

Groups are rated and cut, then k times the largest is taken and struck out. With E <= 512 and
k <= 16 that is fewer steps than any sort. Bound: memory for small k, then the k reductions.
"""

# T tokens  E experts  G groups  K experts a token

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton


def unsupported(num_experts: int, k: int) -> str | None:
  problem = pallas_triton.unavailable()
  if problem is None and (num_experts > 1024 or k > 32):
    return f'is for at most 1024 experts and 32 a token, got {num_experts} and {k}'
  return problem


def _choose_kernel(score_ref, bias_ref, expert_ref, *, tokens, k, groups, kept, group_score):
  num_tokens, num_experts = score_ref.shape
  size = num_experts // groups
  # a tensor's dimensions are powers of two: groups, and their experts, are padded to such
  wide, deep = pl.next_power_of_2(groups), pl.next_power_of_2(size)
  column = jnp.arange(wide * deep)
  group, inside = jax.lax.div(column, deep), jax.lax.rem(column, deep)
  real = (group < groups) & (inside < size)
  expert = group * size + inside
  token = pl.program_id(0) * tokens + jnp.arange(tokens)
  shape = tokens, wide * deep
  at = jnp.broadcast_to(token[:, None], shape), jnp.broadcast_to(expert[None, :], shape)
  mask = (at[0] < num_tokens) & real[None, :]
  score = plt.load(score_ref.at[at], mask=mask, other=-jnp.inf)
  choice = score + plt.load(bias_ref.at[expert], mask=real, other=0.0)[None, :]
  index = jnp.broadcast_to(column[None, :], shape)
  # below every true choice, so that struck and absent experts come last
  none = jnp.float32(-jnp.inf)

  if kept < groups:
    parts = choice.reshape(tokens, wide, deep)
    best = parts.max(2)
    if group_score == 'top2':
      inner = jnp.broadcast_to(jnp.arange(deep)[None, None, :], parts.shape)
      first = jnp.argmax(parts, axis=2)[:, :, None]
      best += jnp.where(inner == first, none, parts).max(2)
    which = jnp.broadcast_to(jnp.arange(wide)[None, :], best.shape)
    keep = jnp.zeros(best.shape, jnp.int32)
    for _ in range(kept):
      first = which == jnp.argmax(best, axis=1)[:, None]
      keep = jnp.where(first, 1, keep)
      best = jnp.where(first, none, best)
    keep = jnp.broadcast_to(keep[:, :, None], parts.shape).reshape(shape)
    choice = jnp.where(keep > 0, choice, none)

  for i in range(k):
    first = jnp.argmax(choice, axis=1)
    chosen = jax.lax.div(first, deep) * size + jax.lax.rem(first, deep)
    plt.store(expert_ref.at[token, jnp.full_like(token, i)], chosen, mask=token < num_tokens)
    choice = jnp.where(index == first[:, None], none, choice)


def choose(
  score_TE: jax.Array,
  bias_E: jax.Array,
  *,
  k: int,
  num_groups: int,
  top_groups: int,
  group_score: str,
  num_warps: int = 4,
) -> jax.Array:
  num_tokens, num_experts = score_TE.shape
  tokens = max(1, 2048 // pl.next_power_of_2(num_experts))
  static = dict(k=k, groups=num_groups, kept=top_groups, group_score=group_score)
  return pallas_triton.call(
    functools.partial(_choose_kernel, tokens=tokens, **static),
    score_TE,
    bias_E,
    grid=(pl.cdiv(num_tokens, tokens),),
    out=jax.ShapeDtypeStruct((num_tokens, k), jnp.int32),
    num_warps=num_warps,
  )
