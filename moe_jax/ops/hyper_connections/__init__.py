"""Manifold-constrained hyper-connections: reading from several residual streams and writing back.

mix = mixing(x_BSJD, fn_JDX, base_X, scale_3, ...)
y_BSD = layer(read(x_BSJD, mix.pre_BSJ))
x_BSJD = write(x_BSJD, y_BSD, mix)
"""

from moe_jax.ops.hyper_connections.reference import Mixing, gates, mixing, read, sinkhorn, write

__all__ = ['Mixing', 'gates', 'mixing', 'read', 'sinkhorn', 'write']
