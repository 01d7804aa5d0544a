"""Mixture of block attention: a query attends to its own block and those it agrees with most.

The reference is the one implementation: scores of all pairs, under masks.
"""

from moe_jax.ops.moba.reference import attention, routed

__all__ = ['attention', 'routed']
