"""Hopper kernel: the probability that each query gives its keys, summed over 64 heads.

What an indexer learns from. As the scores of the forward pass, with the logsumexp known: two
warpgroups take every other block of 64 keys, each with a buffer of its own that warpgroup 2 gathers
into, 64 columns at a time. Keys are the rows of the product and heads its columns, so the sum over
heads is within a row: sums down the rows go through a place in shared memory that both warpgroups
would use at once.
"""

# T queries  H heads  R rows (T*H)  V latent (value) width  C rope width  S keys  K slots of a query

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.sparse_mla import mosaic_gather as mg
from moe_jax.ops.sparse_mla.mosaic_forward import HEADS, Keys

_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_BUFFERS = 2


def mass(
  q_RV: jax.Array,
  q_rope_RC: jax.Array,
  keys: Keys,
  lse_R: jax.Array,
  *,
  scale: float,
  native: bool,
) -> jax.Array:
  """[T, H / 64 rounded up, K] float32: sums over 64 heads; undefined at and after count.

  Args:
    lse_R: base 2, as the forward pass leaves it.
  """
  (num_rows, V), (T, K) = q_RV.shape, keys.row.shape
  num_heads = num_rows // T
  head_blocks = max(1, num_heads // HEADS)
  stored = min(HEADS, num_heads)
  value_tiles = V // mg.TILE
  tiles = value_tiles + 1
  arrivals = mg.Arrivals(_BUFFERS * tiles, native)

  def kernel(
    q_g, q_rope_g, latent_g, rope_g, index_g, count_g, lse_g, out_g,
    q_s, k_s, lse_s, out_s, gathered, ready, q_full, empty,
  ):  # fmt: skip
    group = lax.axis_index('warpgroup')
    block_index = lax.axis_index('block')
    query = lax.div(block_index, jnp.int32(head_blocks))
    head = lax.rem(block_index, jnp.int32(head_blocks)) * HEADS
    num_blocks = pl.cdiv(count_g[query], mg.BLOCK)

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(208, action='increase')
      plgpu.barrier_wait(ready.at[group])
      plgpu.barrier_wait(q_full)
      heads = pl.ds(0, stored)
      lse = plgpu.load(lse_s.at[heads], layout=_COLUMN)

      def block(n, _):
        i = n * _BUFFERS + group

        def scores(acc):
          for c in range(tiles):
            arrivals.wait(gathered, group * tiles + c, n)
            plgpu.wgmma(acc, k_s.at[group, c], q_s.at[c, heads].T)
            plgpu.wgmma_wait(1)
            if c:
              plgpu.barrier_arrive(empty.at[group * tiles + c - 1])
          s = acc[...]
          plgpu.barrier_arrive(empty.at[group * tiles + tiles - 1])
          return s

        s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((mg.BLOCK, stored)))
        p = jnp.exp2(s * (scale * math.log2(math.e)) - lax.broadcast_in_dim(lse, s.shape, [1]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_s[group] = p.sum(axis=1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          out_s.at[group], out_g.at[block_index, pl.ds(i * mg.BLOCK, mg.BLOCK)]
        )

      mine = pl.cdiv(num_blocks - group, _BUFFERS)
      lax.fori_loop(0, mine, block, None)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(64, action='decrease')
      rows = pl.ds(pl.multiple_of(query * num_heads + head, 8), HEADS)
      for c in range(value_tiles):
        columns = pl.ds(c * mg.TILE, mg.TILE)
        plgpu.copy_gmem_to_smem(q_g.at[rows, columns], q_s.at[c], q_full)
      plgpu.copy_gmem_to_smem(q_rope_g.at[rows], q_s.at[value_tiles], q_full)
      plgpu.copy_gmem_to_smem(lse_g.at[rows], lse_s, q_full)
      arrivals.init(gathered)
      for n in range(2):
        plgpu.barrier_arrive(ready.at[n])

      def block(i, held):
        slot = lax.rem(i, jnp.int32(_BUFFERS))
        following = mg.hold_rows(index_g, query, lax.min(i + 1, num_blocks - 1), native=native)
        for c in range(tiles):

          @pl.when(i >= _BUFFERS)
          def _(c=c):
            plgpu.barrier_wait(empty.at[slot * tiles + c])

          source, tile = (rope_g, 0) if c == value_tiles else (latent_g, c)
          mg.gather_tile(
            source, held, index_g, k_s.at[slot, c], gathered,
            tile=tile, into=0, barrier=slot * tiles + c, native=native,
          )  # fmt: skip
        return following

      held = mg.hold_rows(index_g, query, jnp.int32(0), native=native)
      lax.fori_loop(0, num_blocks, block, held)
      mg.drain(native=native)

      def last(i, _):
        for c in range(tiles):
          plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(_BUFFERS)) * tiles + c])

      lax.fori_loop(lax.max(num_blocks - _BUFFERS, 0), num_blocks, last, None)

  tile = lambda *leading: plgpu.SMEM(
    (*leading, mg.BLOCK, mg.TILE), jnp.bfloat16, transforms=mg.TRANSFORMS
  )
  launch: Callable = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((T * head_blocks, K), jnp.float32),
    scratch_types=(
      tile(tiles),
      tile(_BUFFERS, tiles),
      plgpu.SMEM((HEADS,), jnp.float32),
      plgpu.SMEM((2, mg.BLOCK), jnp.float32),
      arrivals.scratch(),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(num_arrivals=tiles + 1),
      plgpu.Barrier(num_barriers=_BUFFERS * tiles),
    ),
    grid=(T * head_blocks,),
    grid_names=('block',),
    num_threads=3,
    thread_name='warpgroup',
    kernel_name='sparse_mla_mass',
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )
  return launch(q_RV, q_rope_RC, *keys, lse_R).reshape(T, head_blocks, K)
