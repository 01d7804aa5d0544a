"""Text in, batches out: batch i is a pure function of (config, seed, i), on any number of hosts."""

from moe_jax.data.pipeline import RowSource, batches
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ['RowSource', 'Tokenizer', 'batches', 'load_tokenizer']
