"""Which keys a query sees, as one range: documents lie in a row one after the other."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# B batch  S sequence


def document_bounds(
  segment_BS: Int[Array, 'B S'],
) -> tuple[Int[Array, 'B S'], Int[Array, 'B S']]:
  """The first token of each token's document, and the first one after it.

  A document is a run of equal numbers; a number that comes back later is another document.
  """
  S = segment_BS.shape[1]
  index_S = jnp.arange(S, dtype=jnp.int32)
  starts_BS = jnp.pad(segment_BS[:, 1:] != segment_BS[:, :-1], ((0, 0), (1, 0)))
  first_BS = jax.lax.cummax(jnp.where(starts_BS, index_S, 0), axis=1)
  next_BS = jnp.pad(jnp.where(starts_BS, index_S, S)[:, 1:], ((0, 0), (0, 1)), constant_values=S)
  return first_BS, jax.lax.cummin(next_BS, axis=1, reverse=True)


def visible_bounds(
  segment_BS: Int[Array, 'B S'], window: int | None
) -> tuple[Int[Array, 'B S'], Int[Array, 'B S']]:
  """Query s sees the keys first[s] to s; key t is seen by the queries t to end[t] - 1.

  Both are nondecreasing along a row. A window counts the query itself.
  """
  first_BS, end_BS = document_bounds(segment_BS)
  if window is not None:
    index_S = jnp.arange(segment_BS.shape[1], dtype=jnp.int32)
    first_BS = jnp.maximum(first_BS, index_S - (window - 1))
    end_BS = jnp.minimum(end_BS, index_S + window)
  return first_BS, end_BS
