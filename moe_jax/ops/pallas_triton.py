"""How the project's Triton kernels are launched, and when they can be.

Pallas' Triton backend is deprecated in jax 0.11 and still complete there. It is used where a kernel
gathers rows by index or reduces along both sides of a tile, which Mosaic cannot.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import backends
from moe_jax.ops.varying import match_vma


def unavailable() -> str | None:
  """Why no Triton kernel can run here, or None."""
  device = jax.devices()[0]
  if device.platform != 'gpu' or float(getattr(device, 'compute_capability', 0)) < 8.9:
    return f'needs an NVIDIA GPU of compute capability 8.9 or more, this is {device.device_kind}'
  return None


def choose(op: str, implementation: str | None, problem: str | None) -> str:
  """'triton' or 'xla'. `problem` is why Triton cannot, if it cannot."""
  return backends.choose(op, implementation, problem, fast='triton')


def call(
  kernel: Callable,
  *args: jax.Array,
  grid: tuple[int, ...],
  out: Any,
  num_warps: int = 4,
  num_stages: int = 2,
  aliases: dict[int, int] | None = None,
) -> Any:
  """Runs `kernel(*input refs, *output refs)` over the grid; references are to whole arrays.

  Outside a GPU it is interpreted. Nothing about it is random or depends on the order of programs.
  """
  args = match_vma(*args)
  varying = jax.typeof(args[0]).mat
  out = jax.tree.map(lambda a: a.update(manual_axis_type=varying), out)
  leaves, tree = jax.tree.flatten(out)
  static: dict[str, Any] = {}
  if isinstance(kernel, functools.partial):
    kernel, static = kernel.func, kernel.keywords
  launch = _launch(
    kernel, tuple(static.items()), grid, tuple(leaves), tree, num_warps, num_stages,
    tuple((aliases or {}).items()), jax.default_backend() != 'gpu',
  )  # fmt: skip
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='.*Triton backend is deprecated.*')
    return launch(*args)


@functools.cache
def _launch(
  kernel: Callable,
  static: tuple[tuple[str, Any], ...],
  grid: tuple[int, ...],
  leaves: tuple[jax.ShapeDtypeStruct, ...],
  tree: Any,
  num_warps: int,
  num_stages: int,
  aliases: tuple[tuple[int, int], ...],
  interpret: bool,
) -> Callable:
  """Jitted, so that a program lowers and compiles a kernel once, however often it launches it."""
  return jax.jit(
    pl.pallas_call(
      functools.partial(kernel, **dict(static)),
      grid=grid,
      out_shape=jax.tree.unflatten(tree, leaves),
      input_output_aliases=dict(aliases),
      compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
      interpret=interpret,
    )
  )
