"""Greedy decoding several tokens a step: multi-token prediction drafts, the model verifies.

The model reads the token it chose last together with the K drafts behind it, in one forward pass
with its cache. A draft is accepted while it is what the model itself would have written, so the
text is greedy decoding's; a pass yields between 1 and K + 1 tokens.

No cache is ever cleaned of a refused draft. One that holds an entry a token needs no cleaning: what
lies behind the length that counts is overwritten. For windows and for what is compressed as it
comes, the cache from before the draft is still there, and reads the accepted tokens once more.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding as sh
from moe_jax.models import mtp
from moe_jax.models.attention import KINDS, Where
from moe_jax.models.decoder import Decoder, Output, embed, empty_cache, head_DV

# B rows, all of the same text  W window  T places for text  K drafts, one a module
# X what a module reads of the decoder: D of the model, or its streams [J, D]

# kinds whose cache holds an entry a token, so that a shorter length undoes what was written; it is
# always right, only slower, to leave a kind out
_APPENDING = ('full', 'mla', 'dsa', 'nsa', 'moba')


class _State(NamedTuple):
  """t[0 .. n] is decided, of which t[n] is not read yet; t[n+1 .. n+K] are drafts."""

  text_T: jax.Array  # int32
  n: jax.Array  # int32
  recent_BWX: jax.Array  # what the decoder left at the last K-1 places, up to that of t[n-1]
  cache: Any  # of t[0 .. n-1]
  draft_caches: tuple[Any, ...]  # of the places before those of `recent_BWX`


def speculate(
  model: Decoder,
  variables: Any,
  prompt: Sequence[int],
  num_tokens: int,
  *,
  stop_id: int | None = None,
) -> tuple[list[int], float]:
  """Continues `prompt` greedily by up to `num_tokens`, ending early after `stop_id`.

  Returns the new ids, those of `decode.generate` at temperature 0, and the share of drafts that
  were accepted. A pass over several tokens rounds its sums differently from a pass over one: a tie
  within that rounding may fall the other way. Runs on the current mesh.

  Raises:
    ValueError: the model has no multi-token prediction, or the prompt is too short for it.
  """
  num_drafts = model.cfg.mtp.num_modules
  if not num_drafts:
    raise ValueError(
      'model.mtp.num_modules=0: nothing drafts. Train with 1 or more, or use decode.generate.'
    )
  if len(prompt) < max(num_drafts - 1, 1):
    raise ValueError(
      f'prompt has {len(prompt)} tokens; {num_drafts} modules need at least '
      f'{max(num_drafts - 1, 1)}. Put an end-of-document id in front.'
    )
  if num_tokens == 0:
    return [], 0.0

  mesh = jax.sharding.get_abstract_mesh()
  prefill, step = _functions(cast(Any, model), mesh, len(prompt), len(prompt) + num_tokens)
  state = prefill(variables, jnp.asarray(np.asarray(prompt, np.int32)))
  new, accepted, passes = [int(state.text_T[len(prompt)])], 0, 0
  while len(new) < num_tokens and stop_id not in new:
    at = len(prompt) + len(new)
    state, num_accepted = step(variables, state)
    accepted, passes = accepted + int(num_accepted), passes + 1
    new += np.asarray(state.text_T)[at : at + int(num_accepted) + 1].tolist()
  if stop_id is not None and stop_id in new:
    new = new[: new.index(stop_id) + 1]
  return new[:num_tokens], accepted / max(passes * num_drafts, 1)


@functools.lru_cache(maxsize=8)
def _functions(model: Decoder, mesh: Any, prompt_length: int, length: int):
  """Compiled prefill and step of a model on a mesh, for texts of up to `length` tokens."""
  c, K = model.cfg, model.cfg.mtp.num_modules
  places = length + 2 * K + 2  # the last drafts reach past the end
  modules = [mtp.MTP(c, model.balance, model.policy) for _ in mtp.names(c)]
  kind = mtp.layer(c).attention
  appends = all(layer.attention in _APPENDING for layer in c.layers)
  drafts_append = kind in _APPENDING
  rows = mesh.shape[sh.DATA] * mesh.shape[sh.EXPERT]

  def place(text_T: jax.Array, start: jax.Array, width: int) -> Where:
    """The `width` tokens from `start` on, in every row."""
    token_W = jax.lax.dynamic_slice_in_dim(text_T, start, width)
    spread = lambda a: jnp.broadcast_to(a, (rows, width), out_sharding=sh.TOKENS)
    start_B = jnp.broadcast_to(start, (rows,), out_sharding=sh.BY_ROW)
    token_BW = spread(token_W)
    return Where(token_BW, spread(start + jnp.arange(width)), jnp.ones_like(token_BW), start_B)

  def greedy(params: Any, hidden_BWD: jax.Array) -> jax.Array:
    """The most likely token at each place of the first row."""
    logits_BWV = jnp.einsum(
      'bwd,dv->bwv', hidden_BWD, head_DV(params, model.policy), preferred_element_type=jnp.float32
    )
    logits_WV = jax.sharding.reshard(logits_BWV, jax.P(None, None, None))[0]
    return jnp.argmax(logits_WV, axis=-1).astype(jnp.int32)

  def draft(variables: Any, text_T: jax.Array, caches: Any, start: jax.Array, h_BWX, last):
    """Writes t[last+2 .. last+1+K] from what the decoder left at places start, start+1, ...

    Places behind `last` hold nothing of value, and the K-1 up to it read drafts: the next call
    starts early enough to make the entries of both again.
    """
    params, width = variables['params'], h_BWX.shape[1]
    new = []
    for k, (name, module) in enumerate(zip(mtp.names(c), modules, strict=True), start=1):
      tokens = place(text_T, start + k, width)
      # read where the decoder read: k places before the token
      where = tokens._replace(position_BS=tokens.position_BS - k, start_B=tokens.start_B - k)
      own = {kind: tree[name] for kind, tree in variables.items() if name in tree}
      embedded_BWD = embed(params['embedding_VD'], where.token_BS, model.policy)
      out = cast(mtp.MTPOutput, module.apply(own, h_BWX, embedded_BWD, where, caches[k - 1]))
      h_BWX = out.state
      last_B1D = jax.lax.dynamic_slice_in_dim(out.hidden_BSD, last - start, 1, axis=1)
      text_T = text_T.at[last + 1 + k].set(greedy(params, last_B1D)[0])
      new.append(out.cache)
    return text_T, tuple(new)

  def draft_and_keep(variables, text_T, caches, start, h_BWX, last, widths, chosen):
    """`draft`, and caches to start the next call from, widths[chosen] places further on."""
    drafted_T, new = draft(variables, text_T, caches, start, h_BWX, last)
    if drafts_append:
      return drafted_T, new

    def keep(width: int) -> Any:
      if width == h_BWX.shape[1]:
        return new
      # these places read no drafts; what is drafted from the last of them is thrown away
      return draft(variables, text_T, caches, start, h_BWX[:, :width], last)[1] if width else caches

    branches = [functools.partial(keep, width) for width in widths]
    return drafted_T, jax.lax.switch(chosen, branches)

  @jax.jit
  def prefill(variables: Any, prompt_W: jax.Array) -> _State:
    text_T = jnp.zeros((places,), jnp.int32).at[:prompt_length].set(prompt_W)
    zero, n = jnp.asarray(0, jnp.int32), jnp.asarray(prompt_length, jnp.int32)
    dtype = model.policy.activations
    cache = empty_cache(c, batch=rows, length=places, dtype=dtype)
    caches = tuple(
      KINDS[kind].empty_cache(c.attention_config(kind), rows, places, dtype) for _ in modules
    )
    out = cast(Output, model.apply(variables, place(text_T, zero, prompt_length), cache))
    state_BWX = cast(jax.Array, out.state)
    text_T = text_T.at[n].set(greedy(variables['params'], out.hidden_BSD[:, -1:])[0])
    settled = prompt_length - (K - 1)
    text_T, caches = draft_and_keep(
      variables, text_T, caches, zero, state_BWX, n - 1, [settled], zero
    )
    return _State(text_T, n, state_BWX[:, settled:], out.cache, caches)

  @functools.partial(jax.jit, donate_argnums=1)
  def step(variables: Any, state: _State) -> tuple[_State, jax.Array]:
    n = state.n

    def read(width: int) -> Output:
      return cast(Output, model.apply(variables, place(state.text_T, n, width), state.cache))

    out = read(K + 1)
    chosen = greedy(variables['params'], out.hidden_BSD)
    drafts = jax.lax.dynamic_slice_in_dim(state.text_T, n + 1, K)
    num_accepted = jnp.cumprod(chosen[:K] == drafts).sum().astype(jnp.int32)
    text_T = jax.lax.dynamic_update_slice_in_dim(state.text_T, chosen, n + 1, axis=0)
    cache = out.cache
    if not appends:
      again = [lambda width=width: read(width).cache for width in range(1, K + 1)]
      cache = jax.lax.switch(num_accepted, [*again, lambda: out.cache])

    window_BWX = jnp.concatenate([state.recent_BWX, cast(jax.Array, out.state)], axis=1)
    start, widths = n - (K - 1), range(1, K + 2)
    text_T, caches = draft_and_keep(
      variables,
      text_T,
      state.draft_caches,
      start,
      window_BWX,
      n + num_accepted,
      widths,
      num_accepted,
    )
    recent_BWX = jax.lax.dynamic_slice_in_dim(window_BWX, num_accepted + 1, K - 1, axis=1)
    return _State(text_T, n + num_accepted + 1, recent_BWX, cache, caches), num_accepted

  return prefill, step
