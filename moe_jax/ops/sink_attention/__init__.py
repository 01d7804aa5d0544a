"""Attention of many heads over one key that is the value too, with a learned sink."""

from moe_jax.ops.sink_attention.reference import entries_visible, sink_attention, window_visible

__all__ = ['entries_visible', 'sink_attention', 'window_visible']
