"""Prefill and token-by-token decoding with a cache of every layer."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding as sh
from moe_jax.infer.sampling import sample
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Decoder, Output, empty_cache, head_DV

# B rows  S new tokens  V vocabulary

_CACHE_MULTIPLE = 64


class Session(NamedTuple):
  """Rows being written: what is cached, and how many tokens of each row are."""

  cache: Any
  length_B: jax.Array  # int32


def open_session(model: Decoder, *, rows: int, length: int) -> Session:
  """An empty session with room for `length` tokens a row, on the current mesh."""
  cache = empty_cache(model.cfg, batch=rows, length=length, dtype=model.policy.activations)
  return Session(cache, jnp.zeros((rows,), jnp.int32, out_sharding=sh.BY_ROW))


def extend(
  model: Decoder, variables: Any, session: Session, token_BS: jax.Array
) -> tuple[jax.Array, Session]:
  """Reads S more tokens of every row; returns float32 logits [B, S, V] and the longer session.

  Prefill is one call with the prompt, decoding one call a token. The caller keeps within the length
  that the session was opened for.
  """
  S = token_BS.shape[1]
  position_BS = session.length_B[:, None] + jnp.arange(S)
  where = Where(token_BS, position_BS, jnp.ones_like(token_BS), session.length_B)
  out = cast(Output, model.apply(variables, where, session.cache))
  head = head_DV(variables['params'], model.policy)
  logits_BSV = jnp.einsum('bsd,dv->bsv', out.hidden_BSD, head, preferred_element_type=jnp.float32)
  return logits_BSV, Session(out.cache, session.length_B + S)


def generate(
  model: Decoder,
  variables: Any,
  prompt: Sequence[int],
  *,
  num_tokens: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
  seed: int = 0,
  stop_id: int | None = None,
) -> list[int]:
  """Continues `prompt` (at least one id) by up to `num_tokens`, ending early after `stop_id`.

  Runs on the current mesh; every row of it holds the same text, and the first is returned.
  """
  if not prompt:
    raise ValueError('prompt has no tokens. Give at least one, such as the end-of-document id.')
  if num_tokens == 0:
    return []
  mesh = jax.sharding.get_abstract_mesh()
  rows = mesh.shape[sh.DATA] * mesh.shape[sh.EXPERT]

  def next_token(logits_BSV: jax.Array, i: jax.Array) -> jax.Array:
    # one row for all: the others only fill the mesh
    logits_1V = jax.sharding.reshard(logits_BSV[:, -1], jax.P(None, None))[:1]
    key = jax.random.fold_in(jax.random.key(seed), i)
    token_1 = sample(logits_1V, key, temperature=temperature, top_p=top_p)
    return token_1[0].astype(jnp.int32)

  def spread(token: jax.Array) -> jax.Array:
    return jnp.broadcast_to(token, (rows, 1), out_sharding=sh.TOKENS)

  @jax.jit
  def prefill(variables: Any, token_BS: jax.Array):
    # kernels read caches in whole tiles
    length = -(-(len(prompt) + num_tokens) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
    session = open_session(model, rows=rows, length=length)
    logits_BSV, session = extend(model, variables, session, token_BS)
    return next_token(logits_BSV, jnp.asarray(0)), session

  @functools.partial(jax.jit, donate_argnums=1)
  def step(variables: Any, session: Session, token: jax.Array, i: jax.Array):
    logits_BSV, session = extend(model, variables, session, spread(token))
    return next_token(logits_BSV, i), session

  prompt_BS = np.tile(np.asarray(prompt, np.int32), (rows, 1))
  token, session = prefill(variables, jax.device_put(prompt_BS, sh.TOKENS))
  new = [int(token)]
  while len(new) < num_tokens and new[-1] != stop_id:
    token, session = step(variables, session, token, jnp.asarray(len(new)))
    new.append(int(token))
  return new
