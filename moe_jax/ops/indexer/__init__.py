"""The lightning indexer of DeepSeek-V3.2: which keys a query attends to, and how that is learned.

The reference has scores and choice of all pairs, as masks. `select_keys` and the losses here work
on some queries at a time, so that 128k tokens fit.
"""

from moe_jax.ops.indexer.loss import dense_index_loss, sparse_index_loss
from moe_jax.ops.indexer.reference import attention_target, index_loss, index_scores, top_k_mask
from moe_jax.ops.indexer.select import select_from_scores, select_keys

__all__ = [
  'attention_target',
  'dense_index_loss',
  'index_loss',
  'index_scores',
  'select_from_scores',
  'select_keys',
  'sparse_index_loss',
  'top_k_mask',
]
