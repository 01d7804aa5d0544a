"""What each query of V4 sees, as runs of neighbours: a window of tokens, and entries."""

# B batch  S queries  T tokens  N entries

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Spans(NamedTuple):
  """First token or entry of each query's run, by its index in the row, and how many.

  Along a row no run begins or ends before the last one did, also where it is empty.
  """

  window_first_BS: jax.Array
  window_count_BS: jax.Array
  entry_first_BS: jax.Array
  entry_count_BS: jax.Array


def spans(
  position_BS: Int[Array, 'B S'], segment_BS: Int[Array, 'B S'], *, window: int, ratio: int
) -> Spans:
  """Of whole rows, whose documents lie end to end; as `window_visible` and `entries_visible`.

  Padding, segment 0, sees itself alone.

  Args:
    position_BS: within the document, without gaps; 0 on padding.
    ratio: tokens an entry, as `ops.compress.closed_windows` has it; 0 where there are none.
  """
  back_BS = jnp.minimum(position_BS, window - 1)
  first_BS = jnp.arange(position_BS.shape[1]) - back_BS
  if not ratio:
    none_BS = jnp.zeros_like(position_BS)
    return Spans(first_BS, back_BS + 1, none_BS, none_BS)
  real_BS = segment_BS > 0
  closes_BS = real_BS & ((position_BS + 1) % ratio == 0)
  count_BS = jnp.where(real_BS, (position_BS + 1) // ratio, 0)
  closed_BS = jnp.cumsum(closes_BS, axis=1, dtype=jnp.int32)
  return Spans(first_BS, back_BS + 1, closed_BS - count_BS, count_BS)


def visible(
  seen: Spans,
  num_entries: int,
  index_BSK: Int[Array, 'B S K'] | None = None,
  *,
  num_tokens: int | None = None,
) -> tuple[Bool[Array, 'B S T'], Bool[Array, 'B S N']]:
  """The same as masks, over tokens, by default as many as queries, and over entries."""

  def mask(first_BS: Array, count_BS: Array, length: int) -> Array:
    behind_BSN = jnp.arange(length) - first_BS[..., None]
    return (behind_BSN >= 0) & (behind_BSN < count_BS[..., None])

  num_tokens = num_tokens or seen.window_first_BS.shape[1]
  tokens_BST = mask(seen.window_first_BS, seen.window_count_BS, num_tokens)
  if index_BSK is None:
    return tokens_BST, mask(seen.entry_first_BS, seen.entry_count_BS, num_entries)
  used_BSK = jnp.arange(index_BSK.shape[-1]) < seen.entry_count_BS[..., None]
  chosen_BSKN = index_BSK[..., None] == jnp.arange(num_entries)
  return tokens_BST, (chosen_BSKN & used_BSK[..., None]).any(2)
