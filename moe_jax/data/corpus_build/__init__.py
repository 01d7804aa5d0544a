"""Assembles a corpus of many domains from pinned packages; `moe_jax.data.build_corpus` is the
command."""
