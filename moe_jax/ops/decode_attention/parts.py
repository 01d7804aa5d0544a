"""Few queries over a long cache are cut into parts, so that there is a block for every SM."""

# N queries  P parts of a query's keys  H heads  V value width
# K listed keys of a query  L places of a part

import jax
import jax.numpy as jnp

BLOCK = 64
# heads of one block of the kernels
_HEADS = 64
# fewer keys than this in a part cost more to combine than they save
_LEAST_KEYS = 256
# blocks for each SM to have one, and half of the next round
_BLOCKS_WANTED = 198


def num_parts(num_queries: int, num_heads: int, num_keys: int) -> int:
  blocks = num_queries * max(1, num_heads // _HEADS)
  return max(1, min(-(-_BLOCKS_WANTED // blocks), num_keys // _LEAST_KEYS))


def consecutive(first_N: jax.Array, count_N: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
  """First key and number of keys of every part, in whole blocks but for the last. [N*P] each."""
  share_N1 = (-(-count_N // (parts * BLOCK)) * BLOCK)[:, None]
  begin_NP = jnp.arange(parts, dtype=jnp.int32) * share_N1
  count_NP = jnp.clip(count_N[:, None] - begin_NP, 0, share_N1)
  row_NP = first_N[:, None] + jnp.where(count_NP > 0, begin_NP, 0)
  return row_NP.reshape(-1).astype(jnp.int32), count_NP.reshape(-1).astype(jnp.int32)


def listed(index_NK: jax.Array, count_N: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
  """The first count of K listed keys, cut: keys [N, P*L] with zeros behind, and counts [N, P].

  Args:
    count_N: at most K.
  """
  K = index_NK.shape[1]
  share = -(-K // (parts * BLOCK)) * BLOCK
  index_NK = jnp.where(jnp.arange(K) < count_N[:, None], index_NK, 0)
  index_NL = jnp.pad(index_NK, ((0, 0), (0, parts * share - K)))
  return index_NL, jnp.clip(count_N[:, None] - jnp.arange(parts) * share, 0, share)


def join(o: jax.Array, lse: jax.Array, parts: int) -> jax.Array:
  """[N*P, H, V] and [N*P, H] of the parts -> [N, H, V]: their mean, weighed by exp(lse)."""
  if parts == 1:
    return o
  o_NPHV, lse_NPH = (a.reshape(-1, parts, *a.shape[1:]) for a in (o, lse))
  weight_NPH = jax.nn.softmax(lse_NPH, axis=1)
  return jnp.einsum('nphv,nph->nhv', o_NPHV.astype(jnp.float32), weight_NPH).astype(o.dtype)
