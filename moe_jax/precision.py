"""Dtype policies: for each kind of operation, what it reads, how that is scaled, how it sums.

`policy('fp8_block')` is what DeepSeek-V3 trained with (arXiv:2412.19437, section 3.3): every
product of a linear layer or an expert in FP8, with a scale for each 1 x 128 values of activations
and gradients and each 128 x 128 of a weight; what is delicate stays in higher precision. On devices
without FP8 arithmetic the same roundings are simulated.

Not in the tables: master weights are float32 under every policy; AdamW's moments are of
`optim.moments_dtype`; sums over micro-batches, norms of gradients and updates are float32.
"""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import PrecisionOverrides, RunConfig
from moe_jax.ops.grouped_matmul.mosaic_gpu import on_hopper
from moe_jax.ops.linear import quantize_weights
from moe_jax.ops.quantize import Format
from moe_jax.ops.recipe import FP8, Product, Recipe


class Line(NamedTuple):
  """One kind of operation."""

  operands: str  # dtype of both, or 'first*second'
  scaling: str  # none, tensor, or block: 1 x 128 of activations and gradients, 128 x 128 of weights
  sums: str
  output: str
  power_of_two: bool = False


# fmt: off
_TABLES = {
  'float32': {
    'linear_forward':  Line('float32', 'none', 'float32', 'float32'),
    'linear_dgrad':    Line('float32', 'none', 'float32', 'float32'),
    'linear_wgrad':    Line('float32', 'none', 'float32', 'float32'),
    'experts_forward': Line('float32', 'none', 'float32', 'float32'),
    'experts_dgrad':   Line('float32', 'none', 'float32', 'float32'),
    'experts_wgrad':   Line('float32', 'none', 'float32', 'float32'),
    'dispatch':        Line('float32', 'none', 'float32', 'float32'),
    'embedding':       Line('float32', 'none', 'float32', 'float32'),
    'head':            Line('float32', 'none', 'float32', 'float32'),
    'gate':            Line('float32', 'none', 'float32', 'float32'),
    'norms':           Line('float32', 'none', 'float32', 'float32'),
    'attention':       Line('float32', 'none', 'float32', 'float32'),
    'gradients':       Line('float32', 'none', 'float32', 'float32'),
  },
  'bfloat16': {
    'linear_forward':  Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'linear_dgrad':    Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'linear_wgrad':    Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'experts_forward': Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'experts_dgrad':   Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'experts_wgrad':   Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'dispatch':        Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'embedding':       Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'head':            Line('bfloat16', 'none', 'float32', 'float32'),
    'gate':            Line('float32',  'none', 'float32', 'float32'),
    'norms':           Line('float32',  'none', 'float32', 'bfloat16'),
    'attention':       Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'gradients':       Line('bfloat16', 'none', 'float32', 'bfloat16'),
  },
  'fp8_tensor': {
    'linear_forward':  Line('e4m3', 'tensor', 'float32', 'bfloat16'),
    'linear_dgrad':    Line('e4m3', 'tensor', 'float32', 'bfloat16'),
    'linear_wgrad':    Line('e4m3', 'tensor', 'float32', 'bfloat16'),
    'experts_forward': Line('e4m3', 'block',  'float32', 'bfloat16'),
    'experts_dgrad':   Line('e4m3', 'block',  'float32', 'bfloat16'),
    'experts_wgrad':   Line('e4m3', 'block',  'float32', 'bfloat16'),
    'dispatch':        Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'embedding':       Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'head':            Line('bfloat16', 'none', 'float32', 'float32'),
    'gate':            Line('float32',  'none', 'float32', 'float32'),
    'norms':           Line('float32',  'none', 'float32', 'bfloat16'),
    'attention':       Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'gradients':       Line('bfloat16', 'none', 'float32', 'bfloat16'),
  },
  'fp8_block': {
    'linear_forward':  Line('e4m3', 'block', 'float32', 'bfloat16'),
    'linear_dgrad':    Line('e4m3', 'block', 'float32', 'bfloat16'),
    'linear_wgrad':    Line('e4m3', 'block', 'float32', 'bfloat16'),
    'experts_forward': Line('e4m3', 'block', 'float32', 'bfloat16'),
    'experts_dgrad':   Line('e4m3', 'block', 'float32', 'bfloat16'),
    'experts_wgrad':   Line('e4m3', 'block', 'float32', 'bfloat16'),
    'dispatch':        Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'embedding':       Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'head':            Line('bfloat16', 'none', 'float32', 'float32'),
    'gate':            Line('float32',  'none', 'float32', 'float32'),
    'norms':           Line('float32',  'none', 'float32', 'bfloat16'),
    'attention':       Line('bfloat16', 'none', 'float32', 'bfloat16'),
    'gradients':       Line('bfloat16', 'none', 'float32', 'bfloat16'),
  },
}
# fmt: on

# of a parameter that is float32 in use under every policy: lookups, gates, norms, and what mixes
# heads or residual streams
_HIGH = frozenset({
  'embedding_VD', 'router_DE', 'weight_D', 'bias_D', 'bias_MX', 'sink_H',
  'fn_JDX', 'base_X', 'scale_3', 'scale_1', 'base_J', 'head_DJ', 'weight_DH',
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Policy:
  """What a model asks of its policy; made of one table."""

  name: str
  activations: jnp.dtype  # the residual stream, and what products give
  matmul: str  # jax's matmul precision for float32 operands
  linear: Recipe
  experts: Recipe
  dispatch: Format | None  # of what crosses to the devices of experts; None: activations
  gradients: jnp.dtype  # of a step's products, before any sum over micro-batches

  def cast(self, weight: jax.Array) -> jax.Array:
    return weight.astype(self.activations)

  @property
  def is_fp8(self) -> bool:
    return self.linear.is_fp8 or self.experts.is_fp8

  @property
  def plain(self) -> bool:
    """Whether dense products are XLA's, of operands in the activations' dtype."""
    same = Product(self.activations.name, self.activations.name)
    return self.linear == Recipe(same, same, same) and self.gradients == self.activations


def table(name: str, overrides: PrecisionOverrides | None = None) -> dict[str, Line]:
  """The policy's lines by kind of operation, as they apply."""
  lines = dict(_TABLES[name])
  for field in dataclasses.fields(PrecisionOverrides):
    words = getattr(overrides, field.name).split() if overrides else []
    if words:
      lines[field.name] = _override(field.name, lines[field.name], words)
  return lines


def policy(name: str, overrides: PrecisionOverrides | None = None) -> Policy:
  lines = table(name, overrides)
  return Policy(
    name=name,
    activations=jnp.dtype(lines['norms'].output),
    # 'highest' keeps GPUs from rounding float32 operands to TF32
    matmul='highest' if name == 'float32' else 'default',
    linear=_recipe(lines, 'linear'),
    experts=_recipe(lines, 'experts'),
    dispatch=_dispatch(lines['dispatch']),
    gradients=jnp.dtype(lines['gradients'].operands),
  )


def policy_of(cfg: RunConfig) -> Policy:
  return policy(cfg.precision, cfg.precision_overrides)


def check_device(cfg: RunConfig) -> None:
  """Refuses FP8 on a GPU that has no such arithmetic; a CPU simulates it.

  Raises:
    ValueError: in one line, with what to do.
  """
  device = jax.devices()[0]
  if policy_of(cfg).is_fp8 and device.platform == 'gpu' and not on_hopper():
    raise ValueError(
      f'precision={cfg.precision!r} needs a Hopper GPU (compute capability 9.0), this is '
      f"{device.device_kind}. Use precision='bfloat16', or a CPU, which simulates FP8."
    )


def compute_copy(policy: Policy, params: Any) -> Any:
  """The parameters as a step multiplies them: weights rounded once, the rest as they are.

  The forward pass of the copy is that of the parameters, bit for bit. Gradients in the copy are in
  compute precision, as what a product gives is rounded to anyway. Where a policy wants gradients
  of more bits there is no copy: products round the master weights themselves.
  """
  if policy.gradients != policy.activations:
    return params

  def cast(path: Any, leaf: jax.Array) -> jax.Array:
    return leaf if path[-1].key in _HIGH else policy.cast(leaf)

  return jax.tree_util.tree_map_with_path(cast, params)


def quantized_copy(policy: Policy, params: Any) -> Any:
  """Collection `fp8`: `ops.linear.Weights` of each matrix that FP8 products may read.

  They are the bits that quantising what `compute_copy` holds would give, made once a step from the
  master weights. Blocks of 128 x 128 need not fit the shares of devices, so on meshes of several
  there is none, and products quantise what they gathered.
  """
  via = policy.activations if policy.gradients == policy.activations else None
  if not policy.is_fp8 or jax.sharding.get_abstract_mesh().size > 1:
    return {}
  found: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    *folders, name = (key.key for key in path)
    dims = re.findall('[A-Z0-9]', name.rpartition('_')[2])
    if name in _HIGH or name == 'head_DV' or len(dims) < 2:
      continue
    recipe = policy.experts if dims[0] == 'E' else policy.linear
    place = functools.reduce(lambda at, key: at.setdefault(key, {}), folders, found)
    place[name] = quantize_weights(_as_matrix(leaf, dims), recipe, via=via)
  return {'fp8': found}


def _as_matrix(leaf: jax.Array, dims: list[str]) -> jax.Array:
  """[..., K, N] of a parameter whose own dimensions are `dims`, behind those of a scan."""
  experts = dims[0] == 'E'
  lead = leaf.ndim - len(dims) + experts
  # heads, or groups, with their channels are contracted together where they come first
  contracted = len(dims) - 1 if dims[-1] == 'D' and not experts else 1
  rows = math.prod(leaf.shape[lead : lead + contracted])
  whole = jax.sharding.reshard(leaf, jax.P(*(None,) * leaf.ndim))
  return whole.reshape(*leaf.shape[:lead], rows, -1)


def _override(kind: str, line: Line, words: list[str]) -> Line:
  for word in words:
    if word in ('tensor', 'block'):
      line = line._replace(scaling=word)
    elif word == 'power_of_two':
      line = line._replace(power_of_two=True)
    elif kind == 'gradients':
      line = line._replace(operands=word, output=word)
    elif word in FP8:
      # the first operand of dgrad is a gradient, of wgrad the second, of forward neither
      first, second = ('e4m3', 'e4m3')
      if kind.endswith('dgrad'):
        first = word
      elif kind.endswith('wgrad'):
        second = word
      else:
        first = second = word
      scaling = 'block' if line.scaling == 'none' else line.scaling
      operands = first if first == second else f'{first}*{second}'
      line = line._replace(operands=operands, scaling=scaling)
    else:
      line = line._replace(operands=word, scaling='none', power_of_two=False)
  return line


def _dispatch(line: Line) -> Format | None:
  if line.operands not in FP8:
    return None
  return Format(dtype=FP8[line.operands], power_of_two=line.power_of_two)


def _recipe(lines: dict[str, Line], kind: str) -> Recipe:
  def product(line: Line) -> Product:
    first, _, second = line.operands.partition('*')
    return Product(first, second or first, line.scaling, line.power_of_two)

  return Recipe(*(product(lines[f'{kind}_{p}']) for p in ('forward', 'dgrad', 'wgrad')))
