"""Attention kinds, one file each. Each reads the normed stream and, when decoding, its cache."""

from moe_jax.models.attention.base import Aux, Cache, Where
from moe_jax.models.attention.compressed import CSA, HCA, Sliding
from moe_jax.models.attention.dsa import DSA
from moe_jax.models.attention.full import FullAttention
from moe_jax.models.attention.mla import MLA
from moe_jax.models.attention.moba import MoBA
from moe_jax.models.attention.nsa import NSA

__all__ = ['KINDS', 'Aux', 'Cache', 'Where']

# by the name that a config uses; ModelConfig.attention_config has the fields of each
KINDS = {
  'full': FullAttention,
  'mla': MLA,
  'dsa': DSA,
  'nsa': NSA,
  'moba': MoBA,
  'sliding': Sliding,
  'csa': CSA,
  'hca': HCA,
}
