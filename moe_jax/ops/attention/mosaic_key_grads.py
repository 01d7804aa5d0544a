"""Hopper kernel: the gradients in keys and values of causal attention within documents.

  scores       computed again, and with what the forward pass kept
                 p = exp2(scale s - lse)   dp = do v'   ds = p (dp - delta)   delta = rowsum(do o)
  tile         128 keys of one head against its queries in steps of 64
  registers    a warpgroup holds dv += p' do and dk += ds' q of its 64 keys, and the scores
               transposed, so that p' and ds' are left operands from where they are
  order        the first keys of a head first: they have the most queries

The queries that see a key are a range too, from itself to `end`, which is nondecreasing along a
row. So a tile visits only steps with something to see, and masks only those that hold a border. A
sum belongs to one warpgroup: no atomics, the same bits on every run.

dk and dv of widths 192 and 128 take 160 registers of a thread, which is why steps are short and p
is kept as bfloat16. Traffic is as forward. Bound: the tensor cores, 4 (C + V) operations a score.
"""

# B batch  S sequence  H query heads  G key-value heads  C key width  V value width
# N queries a step

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.attention.mosaic_common import (
  ACC,
  BY_COLUMN,
  ROWS,
  SLAB,
  Tile,
  add_product,
  along_columns,
  along_rows,
  by_row,
  index,
  launch,
  tiled,
)

TILE = Tile(step=64)


def key_grads(
  q_BSHC: jax.Array,
  k_BSGC: jax.Array,
  v_BSGV: jax.Array,
  do_BSHV: jax.Array,
  lse_BHS: jax.Array,
  delta_BHS: jax.Array,
  end_BS: jax.Array,
  begin_BS: jax.Array | None = None,
  *,
  scale: float,
  tile: Tile = TILE,
  in_registers: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """dk and dv. The arguments by row, from `lse_BHS` on, are padded to whole tiles.

  Args:
    begin_BS: the first query that sees each key, nondecreasing, `end` where there is none; keys
      may then be of another number than queries. None: the key's own.
  """
  B, _, H, C = q_BSHC.shape
  G, V = v_BSGV.shape[2:]
  heads, N, stages = H // G, tile.step, tile.stages
  scale2 = scale * math.log2(math.e)
  dtype = q_BSHC.dtype

  def kernel(q_g, k_g, v_g, do_g, lse_g, delta_g, end_g, begin_g, dk_g, dv_g, *shared):
    k_s, v_s, q_s, do_s, lse_s, delta_s, kv_full, q_full, do_full, empty, left_s = shared
    b, g, t = (lax.axis_index(name) for name in ('row', 'head', 'tile'))
    group = lax.axis_index('warpgroup')
    base = t * ROWS
    start = lambda key: key if begin_g is None else begin_g[b, key]
    begin = lax.div(start(base), jnp.int32(N))
    end = pl.cdiv(end_g[b, base + ROWS - 1], N)
    slot_of = lambda head, step: lax.rem(head * (end - begin) + step - begin, jnp.int32(stages))

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(240, action='increase')
      row = base + group * SLAB
      rows = pl.ds(row, SLAB)
      k_mine, v_mine = k_s.at[group], v_s.at[group]
      plgpu.copy_gmem_to_smem(k_g.at[b, rows, g], k_mine, kv_full.at[group])
      plgpu.copy_gmem_to_smem(v_g.at[b, rows, g], v_mine, kv_full.at[group])
      ends = by_row(end_g.at[b, rows])
      starts = None if begin_g is None else by_row(begin_g.at[b, rows])
      # steps with queries that see some, or all, of this warpgroup's keys
      mine_begin = lax.div(start(row), jnp.int32(N))
      mine_end = pl.cdiv(end_g[b, row + SLAB - 1], N)
      clear_begin = lax.min(pl.cdiv(start(row + SLAB - 1), N), mine_end)
      clear_end = lax.clamp(clear_begin, lax.div(end_g[b, row], jnp.int32(N)), mine_end)
      left = None if in_registers else left_s.at[group]
      plgpu.barrier_wait(kv_full.at[group])

      def accumulate(dk_ref, dv_ref):
        def one_head(head, _):
          def pass_by(step, _):
            slot = slot_of(head, step)
            plgpu.barrier_wait(q_full.at[slot])
            plgpu.barrier_wait(do_full.at[slot])
            plgpu.barrier_arrive(empty.at[slot])

          def one_step(step, _, masked):
            slot = slot_of(head, step)

            def scores(s_ref):
              plgpu.wgmma(s_ref, k_mine, q_s.at[slot].T)
              return s_ref[...], plgpu.load(lse_s.at[slot], layout=BY_COLUMN)

            plgpu.barrier_wait(q_full.at[slot])
            s, lse = pl.run_scoped(scores, ACC((SLAB, N), jnp.float32))
            p = jnp.exp2(s * scale2 - along_columns(lse, SLAB))
            if masked:
              query = index(s.shape, 1) + step * N
              since = index(s.shape, 0) + row if starts is None else along_rows(starts, N)
              p = jnp.where((query >= since) & (query < along_rows(ends, N)), p, 0)
            p = p.astype(dtype)

            def value_products(dp_ref):
              plgpu.wgmma(dp_ref, v_mine, do_s.at[slot].T)
              add_product(dv_ref, p, do_s.at[slot], left)
              # dp is there while dv is still under way
              return plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)

            plgpu.barrier_wait(do_full.at[slot])
            dp = pl.run_scoped(value_products, ACC((SLAB, N), jnp.float32))
            delta = plgpu.load(delta_s.at[slot], layout=BY_COLUMN)
            ds = p * (dp - along_columns(delta, SLAB)).astype(dtype)
            add_product(dk_ref, ds, q_s.at[slot], left)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(empty.at[slot])

          masked, unmasked = (functools.partial(one_step, masked=m) for m in (True, False))
          lax.fori_loop(begin, mine_begin, pass_by, None)
          lax.fori_loop(mine_begin, clear_begin, masked, None)
          lax.fori_loop(clear_begin, clear_end, unmasked, None)
          lax.fori_loop(clear_end, mine_end, masked, None)
          lax.fori_loop(mine_end, end, pass_by, None)

        lax.fori_loop(0, heads, one_head, None)
        return dk_ref[...], dv_ref[...]

      dk, dv = pl.run_scoped(accumulate, ACC((SLAB, C), jnp.float32), ACC((SLAB, V), jnp.float32))
      k_mine[...] = (dk * scale).astype(dtype)
      v_mine[...] = dv.astype(dtype)
      plgpu.commit_smem()
      # past row S, TMA drops what it is given
      plgpu.copy_smem_to_gmem(k_mine, dk_g.at[b, rows, g])
      plgpu.copy_smem_to_gmem(v_mine, dv_g.at[b, rows, g])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(24, action='decrease')

      def one_head(head, _):
        h = g * heads + head

        def load(step, _):
          slot, rows = slot_of(head, step), pl.ds(step * N, N)

          @pl.when(head * (end - begin) + step - begin >= stages)
          def _():
            plgpu.barrier_wait(empty.at[slot])

          plgpu.copy_gmem_to_smem(q_g.at[b, rows, h], q_s.at[slot], q_full.at[slot])
          plgpu.copy_gmem_to_smem(lse_g.at[b, h, rows], lse_s.at[slot], q_full.at[slot])
          plgpu.copy_gmem_to_smem(do_g.at[b, rows, h], do_s.at[slot], do_full.at[slot])
          plgpu.copy_gmem_to_smem(delta_g.at[b, h, rows], delta_s.at[slot], do_full.at[slot])

        lax.fori_loop(begin, end, load, None)

      lax.fori_loop(0, heads, one_head, None)
      total = heads * (end - begin)
      # the last releases must have arrived before the block, and its barriers, may end
      drain = lambda i, _: plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(stages))])
      lax.fori_loop(lax.max(0, total - stages), total, drain, None)

  return launch(
    kernel,
    grid=(B, G, pl.cdiv(k_BSGC.shape[1], ROWS)),
    name='attention_key_grads',
    out_type=(
      jax.ShapeDtypeStruct(k_BSGC.shape, dtype),
      jax.ShapeDtypeStruct(v_BSGV.shape, dtype),
    ),
    scratch_types=(
      tiled((2, SLAB, C), dtype),
      tiled((2, SLAB, V), dtype),
      tiled((stages, N, C), dtype),
      tiled((stages, N, V), dtype),
      plgpu.SMEM((stages, N), jnp.float32),
      plgpu.SMEM((stages, N), jnp.float32),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      None if in_registers else tiled((2, SLAB, N), dtype),
    ),
  )(q_BSHC, k_BSGC, v_BSGV, do_BSHV, lse_BHS, delta_BHS, end_BS, begin_BS)
