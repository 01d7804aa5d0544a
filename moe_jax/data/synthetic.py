"""Tokens without text, for benchmarks: a Markov chain whose unigrams are much like Zipf's."""

# D documents, T tokens a document, V vocabulary, W successors of a token

import numpy as np

from moe_jax.data.store import TokenStore

NUM_SUCCESSORS = 16
DOCUMENT_TOKENS = 1024
BYTES_PER_TOKEN = 4  # what max_megabytes counts
DEFAULT_MEGABYTES = 4.0


def synthetic_split(
  *, vocab_size: int, eos_id: int, seed: int, max_megabytes: float, validation_fraction: float
) -> tuple[TokenStore, TokenStore]:
  """Returns (train, validation) documents of one chain, the same ones for equal arguments.

  A token's successor is the k-th of 16 fixed ones with probability proportional to 1/(k+1); the
  successors are themselves drawn with probability roughly proportional to 1/id. A model can learn
  the transitions, and a router meets the uneven frequencies of text.
  """
  tokens = (max_megabytes or DEFAULT_MEGABYTES) * 1e6 / BYTES_PER_TOKEN
  num_documents = max(2, int(tokens / DOCUMENT_TOKENS))
  num_validation = min(num_documents - 1, max(1, round(num_documents * validation_fraction)))
  rng = np.random.default_rng(seed)
  num_ids = vocab_size - 1  # all but eos
  zipf_VW = np.exp(rng.random((num_ids, NUM_SUCCESSORS)) * np.log(num_ids)).astype(np.int32) - 1
  weights_W = 1 / np.arange(1, NUM_SUCCESSORS + 1)
  edges_W = np.cumsum(weights_W / weights_W.sum())
  tokens_DT = np.empty((num_documents, DOCUMENT_TOKENS), np.int32)
  state_D = rng.integers(num_ids, size=num_documents)
  for t in range(DOCUMENT_TOKENS):
    choice_D = np.searchsorted(edges_W[:-1], rng.random(num_documents), side='right')
    state_D = zipf_VW[state_D, choice_D]
    tokens_DT[:, t] = state_D
  tokens_DT += tokens_DT >= eos_id
  tokens_DT[:, -1] = eos_id
  dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
  return (
    _store(tokens_DT[num_validation:].astype(dtype)),
    _store(tokens_DT[:num_validation].astype(dtype)),
  )


def _store(tokens_DT: np.ndarray) -> TokenStore:
  D, T = tokens_DT.shape
  return TokenStore(tokens_DT.reshape(-1), np.arange(D + 1, dtype=np.int64) * T)
