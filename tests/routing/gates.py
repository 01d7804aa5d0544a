"""Gates for tests: golden logits, padding behind them, rows of them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.route import scores
from moe_jax.routing import Gate, Idea

# B sequences  S tokens  E experts  K experts a token

BY_TOKEN = ('logits_BSE', 'score_BSE', 'valid_BS', 'token_BS', 'expert_BSK')


def read_golden() -> dict[str, np.ndarray]:
  """Logits [3 sequences, 40 tokens, 16 experts], top_k, and values computed in float64."""
  with np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'balance.npz') as file:
    return dict(file)


def make_gate(logits_BSE, kind: str, top_k: int, *, bias_E=0.0) -> Gate:
  """A gate that chose the top_k of score + bias."""
  logits_BSE = jnp.asarray(logits_BSE, jnp.float32)
  B, S, E = logits_BSE.shape
  score_BSE = scores(logits_BSE, kind)
  bias_E = jnp.broadcast_to(jnp.asarray(bias_E, jnp.float32), (E,))
  _, expert_BSK = jax.lax.top_k(score_BSE + bias_E, top_k)
  router_DE = jax.random.normal(jax.random.key(1), (8, E))
  valid_BS, token_BS = jnp.ones((B, S), bool), jnp.arange(B * S).reshape(B, S) % 7
  return Gate(logits_BSE, score_BSE, valid_BS, token_BS, bias_E, router_DE, top_k, expert_BSK)


def padded(gate: Gate, rows: int) -> Gate:
  """The same gate with `rows` tokens of padding behind, full of strange numbers."""
  fills = {'logits_BSE': 50.0, 'score_BSE': 0.9, 'expert_BSK': 3, 'valid_BS': False, 'token_BS': 5}

  def pad(name):
    a = getattr(gate, name)
    return jnp.concatenate([a, jnp.full((len(a), rows, *a.shape[2:]), fills[name], a.dtype)], 1)

  return gate._replace(**{name: pad(name) for name in BY_TOKEN})


def part(gate: Gate, rows: slice) -> Gate:
  """Some of its sequences."""
  return gate._replace(**{name: getattr(gate, name)[rows] for name in BY_TOKEN})


def loss_of(idea: Idea, gate: Gate, *, whole: Gate | None = None, state=None) -> jax.Array:
  """The idea's loss on a gate that is part of the batch `whole` (by default all of it)."""
  state = state or {}
  sums = idea.measure(whole or gate, state) if idea.counts_first else {}
  return idea.loss(gate, state | sums)
