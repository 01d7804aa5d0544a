"""Rows of documents for tests of attention."""

import jax
import jax.numpy as jnp
import numpy as np


def together(documents: list[list[int]], S: int) -> tuple[jax.Array, jax.Array]:
  """Positions and segments of rows of documents end to end, of these lengths; padding behind."""
  position_BS, segment_BS = np.zeros((2, len(documents), S), np.int32)
  for b, lengths in enumerate(documents):
    T = sum(lengths)
    position_BS[b, :T] = np.concatenate([np.arange(n) for n in lengths])
    segment_BS[b, :T] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return jnp.asarray(position_BS), jnp.asarray(segment_BS)
