"""Attention kinds, one file each. Each reads the normed stream and, when decoding, its cache."""

from moe_jax.models.attention.base import Aux, Cache, Where
from moe_jax.models.attention.compressed import CSA, HCA, Sliding
from moe_jax.models.attention.full import FullAttention
from moe_jax.models.attention.mla import MLA

__all__ = ['KINDS', 'Aux', 'Cache', 'Where']

# by the name that a config uses; ModelConfig.attention_config has the fields of each
KINDS = {'full': FullAttention, 'mla': MLA, 'sliding': Sliding, 'csa': CSA, 'hca': HCA}
