"""Attention of each query over a run of neighbouring keys, forward and backward.

The Triton kernels take everything that NSA's kernels take. On Hopper, heads of 64 or 128 have their
gradients from the kernels of dense attention, which see ranges of keys already: a query's keys are
a range, and so are a key's queries, as runs begin and end no earlier than the run before.
"""

# B rows  S queries  N keys of a row  G key-value heads  M query heads of each  C width

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops import pallas_triton
from moe_jax.ops.attention import mosaic, mosaic_forward, mosaic_key_grads, mosaic_query_grads
from moe_jax.ops.attention.mosaic_common import in_eights, whole_tiles
from moe_jax.ops.nsa import triton_runs


def unsupported(width: int, v_width: int) -> str | None:
  """Why these kernels cannot run here for heads of this width, in one line, or None."""
  if problem := pallas_triton.unavailable():
    return problem
  if v_width != width or width not in (16, 32, 64, 128):
    return f'needs keys and values of one width, 16, 32, 64 or 128, got {width} and {v_width}'
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
  scale: float,
  q_BSGMC: Float[Array, 'B S G M C'],
  k_BNGC: Float[Array, 'B N G C'],
  v_BNGC: Float[Array, 'B N G C'],
  first_BS: Int[Array, 'B S'],
  count_BS: Int[Array, 'B S'],
) -> tuple[Float[Array, 'B S G M C'], Float[Array, 'B S G M']]:
  """Outputs and their base-2 logsumexp; 0 and -1e30 for an empty run.

  Args:
    first_BS: the run's first key, nondecreasing along a row, also where a run is empty.
    count_BS: its length; `first_BS + count_BS` is nondecreasing too.
  """
  return forward(q_BSGMC, k_BNGC, v_BNGC, first_BS, count_BS, scale=scale)


def _forward(scale: float, *args):
  out = forward(*args, scale=scale)
  return out, (*args, *out)


def _backward(scale: float, kept, cotangents):
  q, k, v, first_BS, count_BS, o, lse = kept
  do, dlse = cotangents
  delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1) - dlse * math.log2(math.e)
  grads = gradients(q, k, v, first_BS, count_BS, do, lse, delta, scale=scale)
  return *grads, None, None


attention.defvjp(_forward, _backward)


def forward(
  q_BSGMC: jax.Array,
  k_BNGC: jax.Array,
  v_BNGC: jax.Array,
  first_BS: jax.Array,
  count_BS: jax.Array,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """As `attention`, which has a derivative."""
  args = q_BSGMC, k_BNGC, v_BNGC, first_BS, count_BS
  if by_dense_kernels(q_BSGMC):
    return dense_forward(*args, scale=scale)
  o_TGMC, lse_TGM = triton_runs.forward(*_flat(*args), scale=scale)
  return o_TGMC.reshape(q_BSGMC.shape), lse_TGM.reshape(q_BSGMC.shape[:-1])


def gradients(
  q_BSGMC: jax.Array,
  k_BNGC: jax.Array,
  v_BNGC: jax.Array,
  first_BS: jax.Array,
  count_BS: jax.Array,
  do_BSGMC: jax.Array,
  lse_BSGM: jax.Array,
  delta_BSGM: jax.Array,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dq, dk and dv. lse: base 2. delta: the sum of o * do, less what the logsumexp's gradient is."""
  args = q_BSGMC, k_BNGC, v_BNGC, first_BS, count_BS
  if by_dense_kernels(q_BSGMC):
    return dense_gradients(*args, do_BSGMC, lse_BSGM, delta_BSGM, scale=scale)
  q_TGMC, k_RGC, v_RGC, *run = _flat(*args)
  do_TGMC, *sums = (a.reshape(-1, *a.shape[2:]) for a in (do_BSGMC, lse_BSGM, delta_BSGM))
  operands = q_TGMC, do_TGMC, k_RGC, v_RGC, *run, *sums
  dq = triton_runs.query_gradient(*operands, scale=scale)
  dk, dv = triton_runs.key_gradient(*operands, scale=scale)
  return dq.reshape(q_BSGMC.shape), dk.reshape(k_BNGC.shape), dv.reshape(k_BNGC.shape)


def _flat(q, k, v, first_BS, count_BS) -> list[jax.Array]:
  first_BS = first_BS + k.shape[1] * jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
  return [a.reshape(-1, *a.shape[2:]) for a in (q, k, v, first_BS, count_BS)]


def by_dense_kernels(q_BSGMC: jax.Array) -> bool:
  return mosaic.on_hopper() and q_BSGMC.dtype == jnp.bfloat16 and q_BSGMC.shape[-1] in (64, 128)


def dense_forward(
  q_BSGMC: jax.Array,
  k_BNGC: jax.Array,
  v_BNGC: jax.Array,
  first_BS: jax.Array,
  count_BS: jax.Array,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """The output and its base-2 logsumexp by the kernel of dense attention."""
  B, S, G, M, C = q_BSGMC.shape
  o, lse_BHS = mosaic_forward.forward(
    in_eights(q_BSGMC.reshape(B, S, G * M, C)), in_eights(k_BNGC), in_eights(v_BNGC),
    whole_tiles(first_BS), None, whole_tiles(first_BS + count_BS - 1),
    scale=scale, in_registers=jax.default_backend() == 'gpu',
  )  # fmt: skip
  lse_BSGM = jnp.swapaxes(lse_BHS[..., :S], 1, 2).reshape(B, S, G, M)
  some_BS11 = (count_BS > 0)[..., None, None]
  lse_BSGM = jnp.where(some_BS11, lse_BSGM, triton_runs.NO_SCORE)
  o_BSGMC = o[:, :S].reshape(q_BSGMC.shape)
  return jnp.where(some_BS11[..., None], o_BSGMC, jnp.zeros_like(o_BSGMC)), lse_BSGM


def dense_gradients(
  q_BSGMC: jax.Array,
  k_BNGC: jax.Array,
  v_BNGC: jax.Array,
  first_BS: jax.Array,
  count_BS: jax.Array,
  do_BSGMC: jax.Array,
  lse_BSGM: jax.Array,
  delta_BSGM: jax.Array,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dq, dk and dv by the kernels of dense attention."""
  (B, S, G, M, C), N = q_BSGMC.shape, k_BNGC.shape[1]
  heads = lambda a: in_eights(a.reshape(B, S, G * M, C))
  by_row = lambda a: whole_tiles(jnp.swapaxes(a.reshape(B, S, G * M), 1, 2), mode='constant')
  q, do, k, v = heads(q_BSGMC), heads(do_BSGMC), in_eights(k_BNGC), in_eights(v_BNGC)
  sums = by_row(lse_BSGM), by_row(delta_BSGM)
  last_BS = first_BS + count_BS - 1
  how = {'scale': scale, 'in_registers': jax.default_backend() == 'gpu'}
  dq = mosaic_query_grads.query_grads(
    q, k, v, do, *sums, whole_tiles(first_BS), whole_tiles(last_BS), **how
  )
  # of few keys the first have by far the most queries: a program for each query head then keeps
  # all of the chip busy
  shared = M if N < S else 1
  spread = lambda a: jnp.repeat(a, shared, axis=2)
  key_N = jnp.arange(k.shape[1], dtype=jnp.int32)
  find = lambda side: jax.vmap(lambda a: jnp.searchsorted(a, key_N, side=side).astype(jnp.int32))
  begin_BN, end_BN = find('left')(last_BS), find('right')(first_BS)
  parts = mosaic_key_grads.key_grads(
    q, spread(k), spread(v), do, *sums,
    whole_tiles(end_BN), whole_tiles(begin_BN), **how,
  )  # fmt: skip
  total = lambda a: a.reshape(B, -1, G, shared, C).astype(jnp.float32).sum(3)[:, :N]
  dk, dv = (total(a).astype(k.dtype) for a in parts)
  return dq[:, :S].reshape(q_BSGMC.shape), dk, dv
