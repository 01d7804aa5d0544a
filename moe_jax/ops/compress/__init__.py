"""Compression of tokens into entries, window by window, each document for itself."""

from moe_jax.ops.compress.reference import Windows, closed_windows, compress

__all__ = ['Windows', 'closed_windows', 'compress']
