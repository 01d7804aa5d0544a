"""Hopper kernels of the backward pass: probabilities with their gradients, and that of queries.

`probabilities` makes, for 64 heads of one query, p = exp2(s - lse) and ds = scale p (dp - delta)
over its keys, in bfloat16, into device memory: warpgroup 0 multiplies s = q k, warpgroup 1
dp = do v, and warpgroup 2 gathers the latents, 64 keys x 64 columns at a time into a ring of one
block, each tile refilled as soon as both have read it.

`query_gradient` multiplies dq = ds k, three warpgroups with 192 columns of 576 each; the latents
are gathered once more.

Why the two are apart: beside q and do, 139 kB, there is no room for a second block of latents, and
a block that has to stay until its ds is known would leave the tensor cores waiting for the next.
Traffic: 1152 bytes a key, gathered, in either; 256 bytes a key written by the first and 128 read by
the second for 64 heads. Measured at 463 and 332 TFLOP/s with 128 heads on an H100.
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

_ROW = plgpu.Layout.WGMMA.reduce(1)
_PARTS = 3
_BUFFERS = 2


def probabilities(
  q_RV: jax.Array,
  q_rope_RC: jax.Array,
  do_RV: jax.Array,
  keys: Keys,
  lse_R: jax.Array,
  delta_R: jax.Array,
  *,
  scale: float,
  native: bool,
) -> jax.Array:
  """[T, 2H, K] bfloat16: p of all heads, then ds; zeros at and after count_T.

  Args:
    lse_R: base 2, as the forward pass leaves it. delta_R: sum of o * do over its columns.
  """
  (num_rows, V), (T, K) = q_RV.shape, keys.row.shape
  num_heads = num_rows // T
  head_blocks = max(1, num_heads // HEADS)
  stored = min(HEADS, num_heads)
  value_tiles = V // mg.TILE
  tiles = value_tiles + 1
  arrivals = mg.Arrivals(tiles, native)

  def kernel(
    q_g, q_rope_g, do_g, latent_g, rope_g, index_g, count_g, lse_g, delta_g, out_g,
    q_s, do_s, k_s, p_s, ds_s, row_s, gathered, ready, q_full, do_full, empty, p_full, p_free,
  ):  # fmt: skip
    group = lax.axis_index('warpgroup')
    query = lax.div(lax.axis_index('block'), jnp.int32(head_blocks))
    head = lax.rem(lax.axis_index('block'), jnp.int32(head_blocks)) * HEADS
    first_row = pl.multiple_of(query * num_heads + head, 8)
    count = count_g[query]
    num_blocks = pl.cdiv(count, mg.BLOCK)

    def load(source_g, target_s, barrier):
      for c in range(value_tiles):
        at = pl.ds(first_row, HEADS), pl.ds(c * mg.TILE, mg.TILE)
        plgpu.copy_gmem_to_smem(source_g.at[at], target_s.at[c], barrier)

    def product(a_s, num_tiles, round_):
      """a k^T over the block's tiles, each released when read."""

      def multiply(acc):
        for c in range(num_tiles):
          arrivals.wait(gathered, c, round_)
          plgpu.wgmma(acc, a_s.at[c], k_s.at[c].T)
          plgpu.wgmma_wait(1)
          if c:
            plgpu.barrier_arrive(empty.at[c - 1])
        out = acc[...]
        for c in range(num_tiles - 1, tiles):
          plgpu.barrier_arrive(empty.at[c])
        return out

      return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((HEADS, mg.BLOCK)))

    def store(value, staging, i, row):
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      staging[...] = value.astype(staging.dtype)
      plgpu.commit_smem()
      send(staging, i, row)

    def send(staging, i, row):
      at = pl.ds(pl.multiple_of(row, 8), stored), pl.ds(i * mg.BLOCK, mg.BLOCK)
      plgpu.copy_smem_to_gmem(staging.at[pl.ds(0, stored)], out_g.at[at])

    def fill_up(staging, row):
      """Zeros in the slots that the query does not use."""

      @pl.when(num_blocks < K // mg.BLOCK)
      def _():
        zeros = jnp.zeros((HEADS, mg.BLOCK), jnp.float32)
        store(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA), staging, num_blocks, row)
        lax.fori_loop(num_blocks + 1, K // mg.BLOCK, lambda i, _: send(staging, i, row), None)

      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 0)
    def _():
      plgpu.set_max_registers(208, action='increase')
      load(q_g, q_s, q_full)
      plgpu.copy_gmem_to_smem(q_rope_g.at[pl.ds(first_row, HEADS)], q_s.at[value_tiles], q_full)
      plgpu.copy_gmem_to_smem(lse_g.at[pl.ds(first_row, HEADS)], row_s.at[0], q_full)
      plgpu.barrier_wait(ready.at[0])
      plgpu.barrier_wait(q_full)
      lse = plgpu.load(row_s.at[0], layout=_ROW)
      row = query * 2 * num_heads + head

      def block(i, _):
        s = product(q_s, tiles, i)
        p = jnp.exp2(s * (scale * math.log2(math.e)) - lax.broadcast_in_dim(lse, s.shape, [0]))
        at = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
        p = jnp.where(at < count - i * mg.BLOCK, p, 0.0)

        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(p_free)

        store(p, p_s, i, row)
        plgpu.barrier_arrive(p_full)

      lax.fori_loop(0, num_blocks, block, None)

      @pl.when(num_blocks > 0)
      def _():
        plgpu.barrier_wait(p_free)

      fill_up(p_s, row)

    @pl.when(group == 1)
    def _():
      plgpu.set_max_registers(208, action='increase')
      load(do_g, do_s, do_full)
      plgpu.copy_gmem_to_smem(delta_g.at[pl.ds(first_row, HEADS)], row_s.at[1], do_full)
      plgpu.barrier_wait(ready.at[1])
      plgpu.barrier_wait(do_full)
      delta = plgpu.load(row_s.at[1], layout=_ROW)
      row = query * 2 * num_heads + num_heads + head

      def block(i, _):
        dp = product(do_s, value_tiles, i)
        plgpu.barrier_wait(p_full)
        p = plgpu.load(p_s, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        plgpu.barrier_arrive(p_free)
        store(p * (dp - lax.broadcast_in_dim(delta, dp.shape, [0])) * scale, ds_s, i, row)

      lax.fori_loop(0, num_blocks, block, None)
      fill_up(ds_s, row)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(64, action='decrease')
      arrivals.init(gathered)
      for n in range(2):
        plgpu.barrier_arrive(ready.at[n])

      def block(i, held):
        following = mg.hold_rows(index_g, query, lax.min(i + 1, num_blocks - 1), native=native)
        for c in range(tiles):

          @pl.when(i > 0)
          def _(c=c):
            plgpu.barrier_wait(empty.at[c])

          source, tile = (rope_g, 0) if c == value_tiles else (latent_g, c)
          mg.gather_tile(
            source, held, index_g, k_s.at[c], gathered,
            tile=tile, into=0, barrier=c, native=native,
          )  # fmt: skip
        return following

      held = mg.hold_rows(index_g, query, jnp.int32(0), native=native)
      lax.fori_loop(0, num_blocks, block, held)
      mg.drain(native=native)

      @pl.when(num_blocks > 0)
      def _():
        for c in range(tiles):
          plgpu.barrier_wait(empty.at[c])

  tile = lambda *leading: plgpu.SMEM(
    (*leading, mg.BLOCK, mg.TILE), jnp.bfloat16, transforms=mg.TRANSFORMS
  )
  launch: Callable = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((T * 2 * num_heads, K), jnp.bfloat16),
    scratch_types=(
      tile(tiles),
      tile(value_tiles),
      tile(tiles),
      tile(),
      tile(),
      # every buffer starts on 1024 bytes, and there are 120 too few for one more
      plgpu.SMEM((2, HEADS), jnp.float32),
      arrivals.scratch(),
      plgpu.Barrier(num_barriers=2),
      # q in its tiles and lse; do in its and delta
      plgpu.Barrier(num_arrivals=tiles + 1),
      plgpu.Barrier(num_arrivals=value_tiles + 1),
      plgpu.Barrier(num_arrivals=2, num_barriers=tiles),
      plgpu.Barrier(),
      plgpu.Barrier(),
    ),
    grid=(T * head_blocks,),
    grid_names=('block',),
    num_threads=3,
    thread_name='warpgroup',
    kernel_name='sparse_mla_probabilities',
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )
  out = launch(q_RV, q_rope_RC, do_RV, *keys, lse_R, delta_R)
  return out.reshape(T, 2 * num_heads, K)


def query_gradient(p_ds_TPK: jax.Array, keys: Keys, *, native: bool) -> tuple[jax.Array, jax.Array]:
  """ds k for the two parts of q, [R, V] and [R, C], from what `probabilities` returns."""
  V, C, (T, P, K) = keys.latent_SV.shape[1], keys.rope_SC.shape[1], p_ds_TPK.shape
  num_heads = P // 2
  head_blocks = max(1, num_heads // HEADS)
  stored = min(HEADS, num_heads)
  value_tiles = V // mg.TILE
  tiles = value_tiles + 1
  part_tiles = tiles // _PARTS
  width = part_tiles * mg.TILE
  arrivals = mg.Arrivals(_BUFFERS * tiles, native)

  def kernel(
    ds_g, latent_g, rope_g, index_g, count_g, dq_g, dq_rope_g,
    ds_s, k_s, out_s, gathered, ready, ds_full, empty,
  ):  # fmt: skip
    group = lax.axis_index('warpgroup')
    query = lax.div(lax.axis_index('block'), jnp.int32(head_blocks))
    head = lax.rem(lax.axis_index('block'), jnp.int32(head_blocks)) * HEADS
    num_blocks = pl.cdiv(count_g[query], mg.BLOCK)
    slot_of = lambda i: lax.rem(i, jnp.int32(_BUFFERS))

    @pl.when(group < _PARTS)
    def _():
      plgpu.set_max_registers(144, action='increase')
      plgpu.barrier_wait(ready.at[group])

      def sums(acc):
        def block(i, _):
          slot, round_ = slot_of(i), lax.div(i, jnp.int32(_BUFFERS))
          plgpu.barrier_wait(ds_full.at[slot])
          for c in range(part_tiles):
            arrivals.wait(gathered, slot * tiles + group * part_tiles + c, round_)
          plgpu.wgmma(acc, ds_s.at[slot], k_s.at[slot, group])
          plgpu.wgmma_wait(1)

          @pl.when(i > 0)
          def _():
            plgpu.barrier_arrive(empty.at[slot_of(i - 1) * _PARTS + group])

        lax.fori_loop(0, num_blocks, block, None)
        return acc[...]

      dq = pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef((HEADS, width)))

      @pl.when(num_blocks > 0)
      def _():
        plgpu.barrier_arrive(empty.at[slot_of(num_blocks - 1) * _PARTS + group])

      rows = pl.ds(pl.multiple_of(query * num_heads + head, 8), stored)
      staging = out_s.at[group]
      for c in range(part_tiles):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = dq[:, c * mg.TILE : (c + 1) * mg.TILE].astype(out_s.dtype)
        plgpu.commit_smem()
        tile = group * part_tiles + c

        @pl.when(tile < value_tiles)
        def _(tile=tile):
          columns = pl.ds(pl.multiple_of(tile * mg.TILE, mg.TILE), mg.TILE)
          plgpu.copy_smem_to_gmem(staging.at[pl.ds(0, stored)], dq_g.at[rows, columns])

        @pl.when(tile == value_tiles)
        def _():
          plgpu.copy_smem_to_gmem(staging.at[pl.ds(0, stored)], dq_rope_g.at[rows])

      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == _PARTS)
    def _():
      plgpu.set_max_registers(56, action='decrease')
      arrivals.init(gathered)
      for n in range(_PARTS):
        plgpu.barrier_arrive(ready.at[n])
      row = pl.multiple_of(query * P + num_heads + head, 8)

      def block(i, held):
        slot = slot_of(i)
        following = mg.hold_rows(index_g, query, lax.min(i + 1, num_blocks - 1), native=native)

        @pl.when(i >= _BUFFERS)
        def _():
          for n in range(_PARTS):
            plgpu.barrier_wait(empty.at[slot * _PARTS + n])

        at = pl.ds(row, HEADS), pl.ds(i * mg.BLOCK, mg.BLOCK)
        plgpu.copy_gmem_to_smem(ds_g.at[at], ds_s.at[slot], ds_full.at[slot])
        for c in range(tiles):
          part, into = divmod(c, part_tiles)
          source, tile = (rope_g, 0) if c == value_tiles else (latent_g, c)
          mg.gather_tile(
            source, held, index_g, k_s.at[slot, part], gathered,
            tile=tile, into=into, barrier=slot * tiles + c, native=native,
          )  # fmt: skip
        return following

      held = mg.hold_rows(index_g, query, jnp.int32(0), native=native)
      lax.fori_loop(0, num_blocks, block, held)
      mg.drain(native=native)

      def last(i, _):
        for n in range(_PARTS):
          plgpu.barrier_wait(empty.at[slot_of(i) * _PARTS + n])

      lax.fori_loop(lax.max(num_blocks - _BUFFERS, 0), num_blocks, last, None)

  launch: Callable = plgpu.kernel(
    kernel,
    out_type=tuple(jax.ShapeDtypeStruct((T * num_heads, n), jnp.bfloat16) for n in (V, C)),
    scratch_types=(
      plgpu.SMEM((_BUFFERS, HEADS, mg.BLOCK), jnp.bfloat16, transforms=mg.TRANSFORMS),
      plgpu.SMEM((_BUFFERS, _PARTS, mg.BLOCK, width), jnp.bfloat16, transforms=mg.TRANSFORMS),
      plgpu.SMEM((_PARTS, HEADS, mg.TILE), jnp.bfloat16, transforms=mg.TRANSFORMS),
      arrivals.scratch(),
      plgpu.Barrier(num_barriers=_PARTS),
      plgpu.Barrier(num_barriers=_BUFFERS),
      plgpu.Barrier(num_barriers=_BUFFERS * _PARTS),
    ),
    grid=(T * head_blocks,),
    grid_names=('block',),
    num_threads=_PARTS + 1,
    thread_name='warpgroup',
    kernel_name='sparse_mla_query_gradient',
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )
  return launch(p_ds_TPK.reshape(T * P, K), *keys)
