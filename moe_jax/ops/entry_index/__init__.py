"""The lightning indexer over compressed entries: scores, the choice, and its training loss."""

from moe_jax.ops.entry_index.chosen import choose, chosen_scores
from moe_jax.ops.entry_index.reference import entry_scores, index_loss, select_top_k

__all__ = ['choose', 'chosen_scores', 'entry_scores', 'index_loss', 'select_top_k']
