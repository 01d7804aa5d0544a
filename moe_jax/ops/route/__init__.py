"""Scores, group limits and top-k choice of experts."""

from moe_jax.ops.route.reference import keep_top_groups, scores, top_k_route

__all__ = ['keep_top_groups', 'scores', 'top_k_route']
