"""The order of work that the kernels share: whose heads a block takes, and which rows."""

# T queries  H heads

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.backends import num_sms
from moe_jax.ops.sink_attention import mosaic_gather as mg

HEADS = 64


class Item(NamedTuple):
  """One query's block of heads; its window's blocks of keys come before its entries'."""

  query: jax.Array
  head_block: jax.Array
  window_first: jax.Array
  window_count: jax.Array
  entry_first: jax.Array
  entry_count: jax.Array

  @property
  def heads(self) -> Any:
    return pl.ds(pl.multiple_of(self.head_block * HEADS, HEADS), HEADS)

  @property
  def window_blocks(self) -> jax.Array:
    return pl.cdiv(self.window_count, mg.BLOCK)

  @property
  def blocks(self) -> jax.Array:
    return self.window_blocks + pl.cdiv(self.entry_count, mg.BLOCK)

  def live(self, j: jax.Array) -> jax.Array:
    """How many keys block j has; at least its width where it is full."""
    entry = self.entry_count - (j - self.window_blocks) * mg.BLOCK
    return jnp.where(j < self.window_blocks, self.window_count - j * mg.BLOCK, entry)


@dataclasses.dataclass(frozen=True)
class Plan:
  """One block per SM, three warpgroups each; block n takes items n, n + number of blocks, ..."""

  num_queries: int
  num_heads: int
  num_slots: int  # of a query in the index; 0 without one

  @property
  def head_blocks(self) -> int:
    return self.num_heads // HEADS

  @property
  def _grid(self) -> int:
    return num_sms()

  def share(self, num_queries: jax.Array | int) -> jax.Array:
    """How many items fall to this block."""
    items = num_queries * self.head_blocks
    return lax.max(pl.cdiv(items - lax.axis_index('sm'), self._grid), 0)

  def item(self, i: jax.Array, run_g: Any, base: jax.Array | int = 0) -> Item:
    """The i-th item of this block; queries count from `base`."""
    at = lax.axis_index('sm') + i * self._grid
    query = base + lax.div(at, jnp.int32(self.head_blocks))
    return Item(
      query, lax.rem(at, jnp.int32(self.head_blocks)), *(run_g[query, c] for c in range(4))
    )

  def gather(
    self, item: Item, j: jax.Array, row_g, index_g, slots_s, barriers, slot, *, native: bool
  ) -> None:
    """Starts copying block j of an item to a slot."""

    @pl.when(j < item.window_blocks)
    def _():
      run = mg.Run(item.window_first + j * mg.BLOCK, item.live(j))
      mg.gather(row_g, index_g, run, slots_s, barriers, slot, native=native)

    @pl.when(j >= item.window_blocks)
    def _():
      start = (j - item.window_blocks) * mg.BLOCK
      run = mg.Run(item.entry_first + start, item.live(j))
      if self.num_slots:
        run = mg.Run(item.entry_first, item.live(j), item.query * self.num_slots + start)
      mg.gather(row_g, index_g, run, slots_s, barriers, slot, native=native)

  def index(self, index_M: jax.Array | None) -> jax.Array:
    """A kernel takes an array in any case."""
    return jnp.zeros((1,), jnp.int32) if index_M is None else index_M

  def kernel(self, body: Callable, *, out_type, scratch_types, name: str) -> Callable:
    return plgpu.kernel(
      body,
      out_type=out_type,
      scratch_types=scratch_types,
      grid=(self._grid,),
      grid_names=('sm',),
      num_threads=3,
      thread_name='warpgroup',
      kernel_name=name,
      compiler_params=plgpu.CompilerParams(approx_math=True),
    )
