"""Probes of a block: see moe_jax.ops.probe. They exist where the collection `probes` is given."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.ops.probe import NAMES, probe
from moe_jax.precision import Policy

SITES = ('attention_in', 'attention_out', 'feed_forward_in', 'feed_forward_out')


class Probe(nn.Module):
  """A place where a tensor that FP8 products read, or the gradient of what they give, is seen."""

  policy: Policy

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    product = self.policy.linear.forward
    if not product.is_fp8 or not self.has_variable('probes', 'zeros_2N'):
      return x
    zeros_2N = self.get_variable('probes', 'zeros_2N')
    return probe(x, zeros_2N, product.formats()[0], by_tensor=product.scaling == 'tensor')


def zeros(groups: list[tuple[int, int]]) -> dict:
  """The collection for groups of (layers of a pattern, repeats)."""
  name = 'zeros_2N'
  return {
    f'group_{i}': {
      f'layer_{layer}': {f'probe_{site}': {name: jnp.zeros((repeats, 2, len(NAMES)))}
                         for site in SITES}
      for layer in range(layers)
    }
    for i, (layers, repeats) in enumerate(groups)
  }  # fmt: skip
