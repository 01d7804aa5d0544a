"""Hugging Face checkpoints in and out.

  cfg, variables = interop.load('DeepSeek-V2-Lite')       # on the current mesh
  logits_BSV = interop.logits('DeepSeek-V2-Lite', ids)    # float32, on the CPU
  interop.save(cfg, variables, 'mine')                    # for transformers, vLLM, SGLang

One file a generation says which tensor is which parameter: moe_16b.py, v2.py, v3.py.
On the command line: python -m moe_jax.interop.import_hf and .export_hf.
"""

from moe_jax.interop.api import load, logits, save
from moe_jax.interop.errors import InteropError

__all__ = ['InteropError', 'load', 'logits', 'save']
