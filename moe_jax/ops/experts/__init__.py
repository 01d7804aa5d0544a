"""Routed experts over a mesh: tokens travel to their experts and back, and none is dropped.

A token crosses to each device of the `expert` axis at most once, however many of its experts live
there, in buckets of fixed size moved by all_to_all. A bucket holds as many tokens as a device has,
the only size that can never overflow; what a bucket does not fill is sent empty.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax import sharding as sh
from moe_jax.ops.experts.local import NONE_READY, Ready, local_experts
from moe_jax.ops.permute import bucket_by_destination, combine, dispatch
from moe_jax.ops.quantize import Format, Quantized, dequantize_rows, quantize_rows
from moe_jax.ops.recipe import Recipe

# B batch  S sequence  T tokens of one device  D model  F width  E experts  K experts a token
# P devices on the expert axis


def expert_mlp(
  x_BSD: Float[Array, 'B S D'],
  expert_BSK: Int[Array, 'B S K'],
  weight_BSK: Float[Array, 'B S K'],
  gate_up_ED2F: Float[Array, 'E D 2 F'],
  down_EFD: Float[Array, 'E F D'],
  *,
  swiglu_limit: float = 0.0,
  recipe: Recipe | None = None,
  ready: Ready = NONE_READY,
  travel: Format | None = None,
) -> Float[Array, 'B S D']:
  """Weighted sum over each token's experts of down(silu(gate x) * up x), on the current mesh.

  Args:
    x_BSD: tokens, split over (data, expert) by row.
    expert_BSK: the experts of each token, all different.
    weight_BSK: float32 gate weights.
    gate_up_ED2F: stored shares, split as `sharding.EXPERTS_ED2F`; gathered over `data` here.
    down_EFD: likewise, `sharding.EXPERTS_EFD`.
    swiglu_limit: clamp of gate and up values, see ops.swiglu; 0 for none.
    recipe: what the operands of products are rounded to; None: nothing, they are as they come.
    ready: both matrices quantised before, on a mesh of one device, see `local_experts`.
    travel: what tokens are quantised to, 128 values at a time, on their way to other devices, and
      gradients on theirs; None: they travel as they are.

  Gradients reach x, the weights and both matrices.
  """
  body = jax.shard_map(
    functools.partial(_on_device, limit=swiglu_limit, recipe=recipe, travel=travel),
    in_specs=(sh.STREAM, sh.STREAM, sh.STREAM, sh.EXPERTS_ED2F, sh.EXPERTS_EFD, jax.P()),
    out_specs=sh.STREAM,
  )
  return body(x_BSD, expert_BSK, weight_BSK, gate_up_ED2F, down_EFD, ready)


def _on_device(
  x_BSD, expert_BSK, weight_BSK, gate_up_ED2F, down_EFD, ready, *, limit, recipe, travel
):
  gate_up_ED2F = jax.lax.all_gather(gate_up_ED2F, sh.DATA, axis=1, tiled=True)
  down_EFD = jax.lax.all_gather(down_EFD, sh.DATA, axis=2, tiled=True)
  D, K = x_BSD.shape[-1], expert_BSK.shape[-1]
  # each device along `model` computes with its share of the width
  x_TD, expert_TK, weight_TK = (
    jax.lax.pcast(a.reshape(-1, a.shape[-1]), sh.MODEL, to='varying')
    for a in (x_BSD, expert_BSK, weight_BSK)
  )
  if jax.lax.axis_size(sh.EXPERT) == 1:
    y_TD = local_experts(
      x_TD,
      expert_TK,
      weight_TK,
      gate_up_ED2F,
      down_EFD,
      rows=len(x_TD) * K,
      limit=limit,
      recipe=recipe,
      ready=ready,
    )
  else:
    y_TD = _exchange(
      x_TD, expert_TK, weight_TK, gate_up_ED2F, down_EFD, limit=limit, recipe=recipe, travel=travel
    )
  return jax.lax.psum(y_TD, sh.MODEL).reshape(*x_BSD.shape[:2], D)


def _exchange(x_TD, expert_TK, weight_TK, gate_up_ED2F, down_EFD, *, limit, recipe, travel):
  """Sends tokens to the devices of their experts, computes there, and sums what comes back."""
  num_devices, local = jax.lax.axis_size(sh.EXPERT), gate_up_ED2F.shape[0]
  T, K = expert_TK.shape
  device_TP = jnp.arange(num_devices)
  visits_TP = (expert_TK[..., None] // local == device_TP).any(1)
  plan = bucket_by_destination(visits_TP)

  def send(a_TX):
    return _cross(dispatch(a_TX, plan))

  # an empty place in a bucket must not ask for an expert: mark what is not here as `local`
  wanted_RK = expert_TK[plan.token_R]
  owner_R = jnp.repeat(device_TP, T)[:, None]
  here_RK = (wanted_RK // local == owner_R) & (
    jnp.arange(T)[None, :, None] < plan.size_E[:, None, None]
  ).reshape(-1, 1)
  local_RK = jnp.where(here_RK, wanted_RK % local, local)
  local_RK = jax.lax.all_to_all(local_RK.reshape(num_devices, T, K), sh.EXPERT, 0, 0).reshape(
    num_devices * T, K
  )
  tokens_RD: Any = dispatch(x_TD, plan)
  tokens_RD = _cross(tokens_RD) if travel is None else _cross_in_fp8(travel, tokens_RD)
  y_RD = local_experts(
    tokens_RD, local_RK, send(weight_TK), gate_up_ED2F, down_EFD,
    rows=num_devices * T * min(K, local), limit=limit, recipe=recipe,
  )  # fmt: skip
  back_RD = _cross(y_RD) if travel is None else _cross_gradient_in_fp8(travel, y_RD)
  return combine(back_RD, visits_TP.astype(jnp.float32), plan)


def _cross(a_RX: jax.Array) -> jax.Array:
  """[R, X] in one bucket for each device -> what they have for this one. Its own inverse."""
  bucket_PTX = a_RX.reshape(jax.lax.axis_size(sh.EXPERT), -1, a_RX.shape[1])
  return jax.lax.all_to_all(bucket_PTX, sh.EXPERT, 0, 0).reshape(a_RX.shape)


def _in_fp8(fmt: Format, a_RX: jax.Array) -> jax.Array:
  """`_cross` with a byte a value under way, and a scale for each 128 of them."""
  q = quantize_rows(a_RX, fmt)
  crossed = Quantized(_cross(q.values), _cross(q.scale.T).T)
  return dequantize_rows(crossed).astype(a_RX.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_in_fp8(fmt: Format, a_RX: jax.Array) -> jax.Array:
  """`_in_fp8`, whose gradient travels as it is."""
  return _in_fp8(fmt, a_RX)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_gradient_in_fp8(fmt: Format, a_RX: jax.Array) -> jax.Array:
  """`_cross`, whose gradient travels in FP8."""
  del fmt
  return _cross(a_RX)


_cross_in_fp8.defvjp(lambda fmt, a: (_in_fp8(fmt, a), None), lambda fmt, _, da: (_cross(da),))
_cross_gradient_in_fp8.defvjp(
  lambda fmt, a: (_cross(a), None), lambda fmt, _, da: (_in_fp8(fmt, da),)
)
