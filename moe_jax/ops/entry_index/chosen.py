"""V4's indexer in memory linear in the row: chunks of queries, and chosen scores only.

`choose` and `chosen_scores` are `entry_scores` and `select_top_k` with the chosen entries' numbers
in place of masks over all of them.
"""

# B batch  S queries  N compressed entries  H indexer heads  C indexer width  K chosen  R a chunk

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import sharding as sh
from moe_jax.ops.indexer import select_keys
from moe_jax.ops.row_sums import add_rows, inverse

# of products that a chunk of queries makes
_CHUNK_BYTES = 1 << 30


def choose(
  q_BSHC: jax.Array,
  k_BNC: jax.Array,
  weight_BSH: jax.Array,
  first_BS: jax.Array,
  count_BS: jax.Array,
  *,
  k: int,
) -> jax.Array:
  """The entries of the k largest scores of each query, by index in the row, [B, S, K].

  In ascending order, zeros where a query sees fewer; K is the smaller of k and N. Of equals, the
  first. Passes no gradient.

  Args:
    first_BS, count_BS: the run of entries that a query sees.
  """

  def on_device(q, k_BNC, weight, first, count):
    if not jax.sharding.get_abstract_mesh().empty:
      q, weight = (lax.all_gather(a, sh.MODEL, axis=2, tiled=True) for a in (q, weight))
    (B, S), N = first.shape, k_BNC.shape[1]
    # one row of entries, of which a query sees a run of its own row's
    start_B1 = jnp.arange(B, dtype=jnp.int32)[:, None] * N
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    first += start_B1
    runs = flat(first), flat(first + count)
    # the scale of scores does not matter to their order
    index_TK, count_T = select_keys(flat(q), flat(k_BNC), flat(weight), *runs, k=min(k, N))
    index_BSK = index_TK.reshape(B, S, -1) - start_B1[..., None]
    used_BSK = jnp.arange(index_BSK.shape[-1]) < count_T.reshape(B, S, 1)
    return jnp.where(used_BSK, index_BSK, 0)

  args = lax.stop_gradient((q_BSHC, k_BNC, weight_BSH, first_BS, count_BS))
  specs = (sh.HEADS, sh.STREAM, sh.WIDE, sh.TOKENS, sh.TOKENS)
  return _mapped(on_device, specs, *args)


def chosen_scores(
  q_BSHC: jax.Array, k_BNC: jax.Array, weight_BSH: jax.Array, index_BSK: jax.Array
) -> jax.Array:
  """entry_scores of the entries that an index names, float32 [B, S, K]. Deterministic gradient."""

  def on_device(*args):
    return _over_heads(_chosen(*args))

  specs = (sh.HEADS, sh.STREAM, sh.WIDE, sh.STREAM)
  return _mapped(on_device, specs, q_BSHC, k_BNC, weight_BSH, index_BSK)


@jax.custom_vjp
def _chosen(
  q_BSHC: jax.Array, k_BNC: jax.Array, weight_BSH: jax.Array, index_BSK: jax.Array
) -> jax.Array:
  rows = _chunk_rows(index_BSK[:, 0].size * q_BSHC.shape[2] * 4)
  body = lambda q, weight, index: _weighted(q, _named(k_BNC, index), weight)
  return _by_chunks(body, rows, q_BSHC, weight_BSH, index_BSK)


def _weighted(q_BRHC: jax.Array, k_BRKC: jax.Array, weight_BRH: jax.Array) -> jax.Array:
  H, C = q_BRHC.shape[2:]
  dot_BRHK = jnp.einsum('brhc,brkc->brhk', q_BRHC, k_BRKC, preferred_element_type=jnp.float32)
  weight_BRH = weight_BRH.astype(jnp.float32) * H**-0.5
  return (jax.nn.relu(dot_BRHK) * C**-0.5 * weight_BRH[..., None]).sum(2)


def _named(k_BNC: jax.Array, index_BRK: jax.Array) -> jax.Array:
  return jax.vmap(lambda k_NC, index_RK: k_NC[index_RK])(k_BNC, index_BRK)


def _chosen_forward(*args):
  return _chosen(*args), args


def _chosen_backward(kept, dscore_BSK):
  q_BSHC, k_BNC, weight_BSH, index_BSK = kept
  (B, N, C), K = k_BNC.shape, index_BSK.shape[-1]
  rows = _chunk_rows(B * K * max(q_BSHC.shape[2], C) * 4)
  row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None] * N

  def chunk(total_XC, at):
    q, weight, index, dscore = at
    _, pull = jax.vjp(_weighted, q, _named(k_BNC, index), weight)
    dq, dk_BRKC, dweight = pull(dscore)
    order_P, begin = inverse((index + row_B1[..., None]).reshape(-1), B * N)
    return add_rows(total_XC, dk_BRKC.reshape(-1, C), order_P, begin), (dq, dweight)

  S = q_BSHC.shape[1]
  parts = _cut(rows, S, q_BSHC, weight_BSH, index_BSK, dscore_BSK)
  total_XC, grads = lax.scan(chunk, jnp.zeros((B * N, C), jnp.float32), parts)
  dq, dweight = (_join(a, S) for a in grads)
  return dq, total_XC.reshape(k_BNC.shape).astype(k_BNC.dtype), dweight, None


_chosen.defvjp(_chosen_forward, _chosen_backward)


def _chunk_rows(bytes_a_row: int) -> int:
  return max(1, _CHUNK_BYTES // bytes_a_row)


def _by_chunks(body: Callable, rows: int, *args: jax.Array) -> jax.Array:
  """body(*parts) on `rows` queries at a time, dimension 1 of all."""
  S = args[0].shape[1]
  return _join(lax.map(lambda parts: body(*parts), _cut(rows, S, *args)), S)


def _cut(rows: int, S: int, *args: jax.Array) -> tuple[jax.Array, ...]:
  """[B, S, ...] to [chunks, B, rows, ...], the last padded with zeros."""
  rows = min(rows, S)
  chunks = -(-S // rows)

  def cut(a: jax.Array) -> jax.Array:
    pad = ((0, 0), (0, chunks * rows - S), *((0, 0),) * (a.ndim - 2))
    return jnp.moveaxis(jnp.pad(a, pad).reshape(a.shape[0], chunks, rows, *a.shape[2:]), 1, 0)

  return tuple(map(cut, args))


def _join(a: jax.Array, S: int) -> jax.Array:
  a = jnp.moveaxis(a, 0, 1)
  return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :S]


def _over_heads(score: jax.Array) -> jax.Array:
  """The sum over devices that share the heads; outside a mesh there is one device."""
  return score if jax.sharding.get_abstract_mesh().empty else lax.psum(score, sh.MODEL)


def _mapped(fn: Callable, specs: tuple, *args: jax.Array) -> jax.Array:
  if jax.sharding.get_abstract_mesh().empty:
    return fn(*args)
  return jax.shard_map(fn, in_specs=specs, out_specs=sh.STREAM, check_vma=False)(*args)
