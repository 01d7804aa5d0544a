"""The lightning indexer of DeepSeek-V3.2: which keys a query attends to, and how that is learned.

The reference is the one implementation: scores and choice of all pairs, as masks.
"""

from moe_jax.ops.indexer.reference import attention_target, index_loss, index_scores, top_k_mask

__all__ = ['attention_target', 'index_loss', 'index_scores', 'top_k_mask']
