"""Hopper kernel: the queries' gradient, and what each query adds to that of each of its rows.

As in mosaic_forward.py 64 heads of one query are a block's work and its keys come 64 at a time, now
into a single slot. With p = exp2(s - lse) and ds = scale p (do k - delta), in bfloat16:

  scores       each warpgroup makes s = q k and dp = do k of 32 keys; p and ds cross
  queries      dq += ds k, 256 columns each, in registers; then the slot is free, and the next block
               arrives behind what follows
  rows         ds^T q + p^T do, 64 keys x 256 columns each, summed over the 64 heads by the product
               itself, rounded to bfloat16 and stored by slot of the query

Rows that several queries share are summed afterwards, in a fixed order: no atomics.

Traffic: 1024 bytes a key read from L2, 1024 written to device memory and read again by the sum, for
10 * 64 * 512 operations. Shared memory, full but for 2 kB, is read 1.4 times as long as the tensor
cores multiply, and is the bound.
"""

# T queries  H heads  R rows  C width  K slots of a query, window included

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.sink_attention import mosaic_gather as mg
from moe_jax.ops.sink_attention.mosaic_forward import LOG2E, meet
from moe_jax.ops.sink_attention.mosaic_plan import HEADS, Plan

_HALF = mg.BLOCK // 2
_ROW = plgpu.Layout.WGMMA.reduce(1)
# columns of rows that are multiplied at a time, and that leave at a time
_PART, _PIECE = 128, 64


def backward(
  first_query: jax.Array,
  q_THC: jax.Array,
  do_THC: jax.Array,
  row_RC: jax.Array,
  run_T4: jax.Array,
  index_M: jax.Array | None,
  lse_TH: jax.Array,
  delta_TH: jax.Array,
  *,
  queries: int,
  slots: int,
  window_slots: int,
  scale: float,
  native: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Of `queries` queries from `first_query` on: dq [queries, H, C], and [H / 64, queries * K, C].

  Args:
    lse_TH: base 2, as the forward pass leaves it. delta_TH: sum of o * do over columns.
    slots: K, of which the first `window_slots` are the window's; both multiples of 64. Slots in
      blocks of 64 that a query does not use, and queries past the last, are left as they are.
  """
  T, H, C = q_THC.shape
  plan = Plan(T, H, 0 if index_M is None else index_M.size // T)
  columns = C // 2
  part, piece = min(_PART, columns), min(_PIECE, columns)

  def kernel(
    first_g, q_g, do_g, row_g, run_g, index_g, lse_g, delta_g, dq_g, out_g,
    q_s, do_s, k_s, p_s, ds_s, out_s, row_s, full, q_free, ready, free, met, crossed, landed,
  ):  # fmt: skip
    group = lax.axis_index('warpgroup')
    base = first_g[0]
    share = plan.share(lax.min(queries, T - base))
    slot = jnp.int32(0)

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(232, action='increase')
      plgpu.barrier_wait(ready)

      def leave(value, target):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_s[group] = value.astype(out_s.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s.at[group], target)

      def attend(i, done):
        item = plan.item(i, run_g, base)
        query = item.query - base
        plgpu.barrier_wait(full)
        lse, delta = (plgpu.load(row_s.at[n], layout=_ROW, optimized=False) for n in range(2))
        acc = plgpu.layout_cast(jnp.zeros((HEADS, columns), jnp.float32), plgpu.Layout.WGMMA)

        def block(j, acc):
          mine = mg.opaque(group, native=native)
          zero = mine - group
          keys = pl.ds(mine * _HALF, _HALF)
          mg.wait(landed, slot, done + j, native=native)

          def with_keys(a_s):
            def product(ref):
              for c in range(2):
                plgpu.wgmma(ref, a_s.at[c + 2 * zero], k_s.at[zero, c, keys].T)
              return ref[...]

            return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((HEADS, _HALF), jnp.float32))

          s, dp = with_keys(q_s), with_keys(do_s)
          across = lambda row: lax.broadcast_in_dim(row, s.shape, [0])
          at = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
          p = jnp.exp2(s * (scale * LOG2E) - across(lse))
          p = jnp.where(at < item.live(j) - group * _HALF, p, 0.0)
          ds = p * (dp - across(delta)) * scale

          # the other has multiplied the last block's
          @pl.when(done + j > 0)
          def _():
            plgpu.barrier_wait(met)

          p_s[zero, :, keys] = p.astype(p_s.dtype)
          ds_s[zero, :, keys] = ds.astype(ds_s.dtype)
          plgpu.commit_smem()
          meet(crossed)
          queries_part = lambda ref: plgpu.wgmma(ref, ds_s.at[zero], k_s.at[zero, mine])
          acc = mg.accumulate(acc, queries_part, native=native)
          plgpu.barrier_arrive(free)

          entry_slot = window_slots + (j - item.window_blocks) * mg.BLOCK
          place = jnp.where(j < item.window_blocks, j * mg.BLOCK, entry_slot)
          at_rows = pl.ds(pl.multiple_of(query * slots + place, mg.BLOCK), mg.BLOCK)
          for start in range(0, columns, part):

            def rows(ref, start=start):
              at = pl.ds(start, part)
              plgpu.wgmma(ref, ds_s.at[zero].T, q_s.at[mine, :, at])
              plgpu.wgmma(ref, p_s.at[zero].T, do_s.at[mine, :, at])
              return ref[...]

            sums = pl.run_scoped(rows, plgpu.WGMMAAccumulatorRef((mg.BLOCK, part), jnp.float32))
            for c in range(0, part, piece):
              at_columns = pl.ds(group * columns + start + c, piece)
              leave(sums[:, c : c + piece], out_g.at[item.head_block, at_rows, at_columns])
          plgpu.barrier_arrive(met)
          return acc

        acc = lax.fori_loop(0, item.blocks, block, acc)
        plgpu.barrier_arrive(q_free)
        for c in range(0, columns, piece):
          at_columns = pl.ds(group * columns + c, piece)
          leave(acc[:, c : c + piece], dq_g.at[query, item.heads, at_columns])
        return done + item.blocks

      done = lax.fori_loop(0, share, attend, jnp.int32(0))

      @pl.when(done > 0)
      def _():
        plgpu.barrier_wait(met)

      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(40, action='decrease')
      mg.start(landed, 1, native=native)
      plgpu.barrier_arrive(ready)

      def fetch(i, done):
        item = plan.item(i, run_g, base)

        def block(j, _):
          @pl.when(done + j > 0)
          def _():
            plgpu.barrier_wait(free)

          plan.gather(item, j, row_g, index_g, k_s, landed, slot, native=native)

          @pl.when(j == 0)
          def _():
            @pl.when(i > 0)
            def _():
              plgpu.barrier_wait(q_free)

            at = item.query, item.heads
            plgpu.copy_gmem_to_smem(lse_g.at[at], row_s.at[0], full)
            plgpu.copy_gmem_to_smem(delta_g.at[at], row_s.at[1], full)
            for source, target in ((q_g, q_s), (do_g, do_s)):
              for c in range(2):
                half = source.at[(*at, pl.ds(c * columns, columns))]
                plgpu.copy_gmem_to_smem(half, target.at[c], full)

        lax.fori_loop(0, item.blocks, block, None)
        return done + item.blocks

      done = lax.fori_loop(0, share, fetch, jnp.int32(0))

      @pl.when(done > 0)
      def _():
        plgpu.barrier_wait(free)
        plgpu.barrier_wait(q_free)

  tile = lambda *shape: plgpu.SMEM(shape, q_THC.dtype, transforms=mg.TILING)
  return plan.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((queries, H, C), q_THC.dtype),
      jax.ShapeDtypeStruct((plan.head_blocks, queries * slots, C), q_THC.dtype),
    ),
    scratch_types=(
      tile(2, HEADS, columns),
      tile(2, HEADS, columns),
      tile(1, 2, mg.BLOCK, columns),
      tile(1, HEADS, mg.BLOCK),
      tile(1, HEADS, mg.BLOCK),
      tile(2, mg.BLOCK, piece),
      plgpu.SMEM((2, HEADS), jnp.float32),
      plgpu.Barrier(num_arrivals=6),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      mg.arrivals(1, native=native),
    ),
    name='sink_attention_backward',
  )(first_query, q_THC, do_THC, row_RC, run_T4, plan.index(index_M), lse_TH, delta_TH)
