"""Scores, group limits and top-k choice of experts; hash tables that choose by token id."""

from moe_jax.ops.route.hash_table import hash_table
from moe_jax.ops.route.reference import keep_top_groups, scores, top_k_route, weigh

__all__ = ['hash_table', 'keep_top_groups', 'scores', 'top_k_route', 'weigh']
