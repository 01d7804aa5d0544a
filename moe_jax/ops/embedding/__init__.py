"""Rows of a table by token id, with a gradient that sums in float32 and in a fixed order.

The gradient of a lookup adds rows of the same id. As a scatter-add that takes atomic operations on
a GPU: slow, and in an order that changes. Here tokens are sorted by id, 128 neighbouring ids make a
group, and the sums of each group are one product, one_hot(id in group)^T dy: the weight gradient of
ops.grouped_matmul, which reads every row once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax import sharding as sh
from moe_jax.ops.grouped_matmul import mosaic_gpu, weight_grad

# B batch  S sequence  T tokens of one device  V vocabulary  D model  G groups of ids

IMPLEMENTATIONS = ('scatter', 'grouped')
GROUP = 128


def embed(
  table_VD: Float[Array, 'V D'],
  token_BS: Int[Array, 'B S'],
  *,
  dtype: jax.typing.DTypeLike,
  implementation: str | None = None,
) -> Float[Array, 'B S D']:
  """table[token] in `dtype`, on the current mesh.

  Args:
    table_VD: stored share, split as `sharding.EMBEDDING_VD`; gathered in `dtype` here. Its gradient
      is a float32 sum in the table's own dtype, split the same.
    token_BS: ids in [0, V), split by row.
    implementation: of the gradient, `scatter` or `grouped`; by default `grouped` where its kernel
      runs.

  Raises:
    NotImplementedError: `grouped` where its kernel cannot run; it says why.
  """
  D = table_VD.shape[1]
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'implementation={implementation!r} is not one of {", ".join(IMPLEMENTATIONS)}.'
    )
  if implementation is None:
    refusal = mosaic_gpu.unsupported(jnp.dtype(dtype), token_BS.size, GROUP, D)
    implementation = 'scatter' if refusal else 'grouped'
  return _embed(implementation, jnp.dtype(dtype), table_VD, token_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _embed(implementation, dtype, table_VD, token_BS):
  table_VD = table_VD.astype(dtype)
  if jax.sharding.get_abstract_mesh().empty:
    return table_VD[token_BS]
  whole_VD = jax.sharding.reshard(table_VD, jax.P(None, None))
  return whole_VD.at[token_BS].get(out_sharding=sh.STREAM)


def _forward(implementation, dtype, table_VD, token_BS):
  # an empty array carries the table's type to the backward pass
  like = jnp.zeros((0,), table_VD.dtype)
  return _embed(implementation, dtype, table_VD, token_BS), (token_BS, like, table_VD.shape[0])


def _backward(implementation, dtype, kept, dy_BSD):
  token_BS, like, num_ids = kept
  sums = functools.partial(_sums, implementation=implementation, num_ids=num_ids)
  if jax.sharding.get_abstract_mesh().empty:
    dtable_VD = sums(token_BS, dy_BSD)
  else:

    def on_device(token_BS, dy_BSD):
      dtable_VD = jax.lax.psum(sums(token_BS, dy_BSD), sh.EXPERT)
      return jax.lax.psum_scatter(dtable_VD, sh.DATA, scatter_dimension=1, tiled=True)

    dtable_VD = jax.shard_map(
      on_device, in_specs=(sh.TOKENS, sh.STREAM), out_specs=jax.P(None, sh.DATA)
    )(token_BS, dy_BSD)
    dtable_VD = jax.sharding.reshard(dtable_VD, sh.EMBEDDING_VD)
  return dtable_VD.astype(like.dtype), np.zeros(token_BS.shape, jax.dtypes.float0)


_embed.defvjp(_forward, _backward)


def _sums(token_BS, dy_BSD, *, implementation, num_ids):
  """Sum of the rows of dy of each id, float32 [V, D], over the tokens of this device."""
  T, D = token_BS.size, dy_BSD.shape[-1]
  token_T, dy_TD = token_BS.reshape(T), dy_BSD.reshape(T, D)
  if implementation == 'scatter':
    return jax.ops.segment_sum(dy_TD.astype(jnp.float32), token_T, num_ids)
  groups = -(-num_ids // GROUP)
  order_T = jnp.argsort(token_T, stable=True)
  sorted_T = token_T[order_T]
  place_TX = jax.nn.one_hot(sorted_T % GROUP, GROUP, dtype=dy_TD.dtype)
  # token ids are sorted: where each group ends is a search, not a count
  first_G = jnp.arange(groups + 1, dtype=token_T.dtype) * GROUP
  size_G = jnp.diff(jnp.searchsorted(sorted_T, first_G)).astype(jnp.int32)
  sum_GXD = weight_grad(place_TX, dy_TD[order_T], size_G, dtype=jnp.float32)
  return sum_GXD.reshape(groups * GROUP, D)[:num_ids]
