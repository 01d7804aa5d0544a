"""Next-token loss from the last hidden state, without holding all logits at once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK = 1024  # positions whose logits are held at once

# B batch  S sequence  D model  V vocabulary  N chunks  M positions a chunk


def token_losses(
  hidden_BSD: Float[Array, 'B S D'], head_DV: Float[Array, 'D V'], target_BS: Int[Array, 'B S']
) -> Float[Array, 'B S']:
  """-log softmax(hidden head)[target] of every position, float32."""
  logits_BSV = jnp.einsum('bsd,dv->bsv', hidden_BSD, head_DV, preferred_element_type=jnp.float32)
  # a masked sum, not an index: it also works where `model` splits the vocabulary
  hit_BSV = jnp.arange(head_DV.shape[1]) == target_BS[..., None]
  return jax.nn.logsumexp(logits_BSV, axis=-1) - jnp.where(hit_BSV, logits_BSV, 0).sum(-1)


def total_loss(
  hidden_BSD: Float[Array, 'B S D'],
  head_DV: Float[Array, 'D V'],
  target_BS: Int[Array, 'B S'],
  mask_BS: Bool[Array, 'B S'],
  *,
  chunk: int = CHUNK,
) -> Float[Array, '']:
  """Sum of the losses where `mask_BS` is true, in nats.

  Long sequences go through `chunk` positions at a time, and each chunk's logits are computed again
  in the backward pass, so that memory holds the logits of one chunk.
  """
  S = hidden_BSD.shape[1]
  if chunk >= S or S % chunk:
    return jnp.where(mask_BS, token_losses(hidden_BSD, head_DV, target_BS), 0).sum()

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def one_chunk(total, i):
    hidden, target, mask = (
      jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=1)
      for a in (hidden_BSD, target_BS, mask_BS)
    )
    return total + jnp.where(mask, token_losses(hidden, head_DV, target), 0).sum(), None

  return jax.lax.scan(one_chunk, jnp.zeros((), jnp.float32), jnp.arange(S // chunk))[0]
