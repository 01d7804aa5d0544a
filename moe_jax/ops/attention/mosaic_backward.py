"""Hopper kernels: the gradients of causal attention within documents.

Both compute the scores again and then, in base 2 and with `lse` from the forward pass,

  p = exp2(scale s - lse)      dp = do v'      ds = p (dp - delta)      delta = rowsum(do o)

  key_grads    128 keys of one head against its queries in steps of 64. A warpgroup holds the sums
               dv += p' do and dk += ds' q of its 64 keys, and the scores transposed, so that p'
               and ds' are left operands straight from registers
  query_grads  128 queries against the keys in steps of 64, dq += ds k likewise
  order        longest tiles first: the first keys, the last queries

The queries that see a key are a range too, from itself to `end`, so both kernels visit only blocks
with something to see and mask only those that hold a border. A sum belongs to one warpgroup: no
atomics, the same bits on every run.

dk and dv of widths 192 and 128 take 160 registers of a thread, which is why the steps are short and
p is kept as bfloat16. Traffic is the forward's. Bound: the tensor cores; 4 (C + V) + 4 C + 2 V
operations a score, of which 2 (C + V) are the scores and dp a second time.
"""

# B batch  S sequence  H query heads  G key-value heads  C key width  V value width
# N queries or keys a step

import dataclasses
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
  add_product,
  along_columns,
  along_rows,
  by_row,
  index,
  launch,
  load_keys,
  tiled,
)


@dataclasses.dataclass(frozen=True)
class Tile:
  inner: int = 64
  stages: int = 2


def key_grads(
  q_BSHC: jax.Array,
  k_BSGC: jax.Array,
  v_BSGV: jax.Array,
  do_BSHV: jax.Array,
  lse_BHS: jax.Array,
  delta_BHS: jax.Array,
  end_BS: jax.Array,
  *,
  scale: float,
  tile: Tile = Tile(),
  in_registers: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """dk and dv. The arguments by row, the last three, are padded to whole tiles."""
  B, S, H, C = q_BSHC.shape
  G, V = v_BSGV.shape[2:]
  heads, N, stages = H // G, tile.inner, tile.stages
  scale2 = scale * math.log2(math.e)
  dtype = q_BSHC.dtype

  def kernel(q_g, k_g, v_g, do_g, lse_g, delta_g, end_g, dk_g, dv_g, *shared):
    k_s, v_s, q_s, do_s, lse_s, delta_s, kv_full, q_full, do_full, empty, left_s = shared
    b, g, t = (lax.axis_index(name) for name in ('row', 'head', 'tile'))
    group = lax.axis_index('warpgroup')
    base = t * ROWS
    begin = lax.div(base, jnp.int32(N))
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
      # steps with queries that see some, or all, of this warpgroup's keys
      mine_begin = lax.div(row, jnp.int32(N))
      mine_end = pl.cdiv(end_g[b, row + SLAB - 1], N)
      clear_begin = lax.min(pl.cdiv(row + SLAB - 1, N), mine_end)
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
              key, query = index(s.shape, 0) + row, index(s.shape, 1) + step * N
              p = jnp.where((query >= key) & (query < along_rows(ends, N)), p, 0)
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
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

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

        # there is a first step, and it need not wait until `end` has come from device memory
        load(begin, None)
        lax.fori_loop(begin + 1, end, load, None)

      lax.fori_loop(0, heads, one_head, None)
      total = heads * (end - begin)
      # the last releases must have arrived before the block, and its barriers, may end
      drain = lambda i, _: plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(stages))])
      lax.fori_loop(lax.max(0, total - stages), total, drain, None)

  return launch(
    kernel,
    grid=(B, G, pl.cdiv(S, ROWS)),
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
  )(q_BSHC, k_BSGC, v_BSGV, do_BSHV, lse_BHS, delta_BHS, end_BS)


def query_grads(
  q_BSHC: jax.Array,
  k_BSGC: jax.Array,
  v_BSGV: jax.Array,
  do_BSHV: jax.Array,
  lse_BHS: jax.Array,
  delta_BHS: jax.Array,
  first_BS: jax.Array,
  *,
  scale: float,
  tile: Tile = Tile(),
  in_registers: bool = True,
) -> jax.Array:
  """dq. The arguments by row, the last three, are padded to whole tiles."""
  B, S, H, C = q_BSHC.shape
  G, V = v_BSGV.shape[2:]
  N, stages = tile.inner, tile.stages
  num_tiles = pl.cdiv(S, ROWS)
  scale2 = scale * math.log2(math.e)
  dtype = q_BSHC.dtype

  def kernel(q_g, k_g, v_g, do_g, lse_g, delta_g, first_g, dq_g, *shared):
    q_s, do_s, k_s, v_s, q_full, k_full, v_full, k_empty, v_empty, left_s = shared
    b, h, t = (lax.axis_index(name) for name in ('row', 'head', 'tile'))
    group = lax.axis_index('warpgroup')
    base = (num_tiles - 1 - t) * ROWS
    # block i is the i-th from the end, which is known at once
    end = pl.cdiv(lax.min(base + ROWS, S), N)
    num_blocks = end - lax.div(first_g[b, base], jnp.int32(N))
    slot_of = lambda i: lax.rem(i, jnp.int32(stages))

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(240, action='increase')
      row = base + group * SLAB
      rows = pl.ds(row, SLAB)
      q_mine, do_mine = q_s.at[group], do_s.at[group]
      plgpu.copy_gmem_to_smem(q_g.at[b, rows, h], q_mine, q_full.at[group])
      plgpu.copy_gmem_to_smem(do_g.at[b, rows, h], do_mine, q_full.at[group])
      first = by_row(first_g.at[b, rows])
      lse = along_rows(by_row(lse_g.at[b, h, rows]), N)
      delta = along_rows(by_row(delta_g.at[b, h, rows]), N)
      # blocks before these hold keys later than any query of this warpgroup, later than some, that
      # all see, before the `first` of some; and in the rest of any
      mine = lax.max(end - pl.cdiv(row + SLAB, N), 0)
      none = end - lax.div(first_g[b, row], jnp.int32(N))
      clear = lax.min(end - lax.div(row, jnp.int32(N)), none)
      early = lax.clamp(clear, end - pl.cdiv(first_g[b, row + SLAB - 1], N), none)
      left = None if in_registers else left_s.at[group]
      plgpu.barrier_wait(q_full.at[group])

      def accumulate(dq_ref):
        def pass_by(i, _):
          slot = slot_of(i)
          for full, empty in ((k_full, k_empty), (v_full, v_empty)):
            plgpu.barrier_wait(full.at[slot])
            plgpu.barrier_arrive(empty.at[slot])

        def one_step(i, _, masked):
          slot = slot_of(i)

          def run(s_ref, dp_ref):
            plgpu.barrier_wait(k_full.at[slot])
            plgpu.wgmma(s_ref, q_mine, k_s.at[slot].T)
            plgpu.barrier_wait(v_full.at[slot])
            plgpu.wgmma(dp_ref, do_mine, v_s.at[slot].T)
            # p is computed while dp is still under way
            p = jnp.exp2(plgpu.wgmma_accumulator_load(s_ref, wait_n=1) * scale2 - lse)
            if masked:
              key, query = index(p.shape, 1) + (end - 1 - i) * N, index(p.shape, 0) + row
              p = jnp.where((key >= along_rows(first, N)) & (key <= query), p, 0)
            return p, dp_ref[...]

          block = ACC((SLAB, N), jnp.float32)
          p, dp = pl.run_scoped(run, block, block)
          plgpu.barrier_arrive(v_empty.at[slot])
          add_product(dq_ref, (p * (dp - delta)).astype(dtype), k_s.at[slot], left)
          plgpu.wgmma_wait(0)
          plgpu.barrier_arrive(k_empty.at[slot])

        masked, unmasked = (functools.partial(one_step, masked=m) for m in (True, False))
        lax.fori_loop(0, mine, pass_by, None)
        lax.fori_loop(mine, clear, masked, None)
        lax.fori_loop(clear, early, unmasked, None)
        lax.fori_loop(early, none, masked, None)
        lax.fori_loop(none, num_blocks, pass_by, None)
        return dq_ref[...]

      dq = pl.run_scoped(accumulate, ACC((SLAB, C), jnp.float32))
      q_mine[...] = (dq * scale).astype(dtype)
      plgpu.commit_smem()
      # past row S, TMA drops what it is given
      plgpu.copy_smem_to_gmem(q_mine, dq_g.at[b, rows, h])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(24, action='decrease')
      rings = (k_s, k_full, k_empty), (v_s, v_full, v_empty)
      at = b, lax.div(h, jnp.int32(H // G))
      load_keys((k_g, v_g), rings, at=at, end=end, num_blocks=num_blocks)

  return launch(
    kernel,
    grid=(B, H, num_tiles),
    name='attention_query_grads',
    out_type=jax.ShapeDtypeStruct(q_BSHC.shape, dtype),
    scratch_types=(
      tiled((2, SLAB, C), dtype),
      tiled((2, SLAB, V), dtype),
      tiled((stages, N, C), dtype),
      tiled((stages, N, V), dtype),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      None if in_registers else tiled((2, SLAB, N), dtype),
    ),
  )(q_BSHC, k_BSGC, v_BSGV, do_BSHV, lse_BHS, delta_BHS, first_BS)
