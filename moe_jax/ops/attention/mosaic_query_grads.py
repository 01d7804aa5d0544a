"""Hopper kernel: the gradient in queries of causal attention within documents.

mosaic_key_grads.py has the formulas; here a tile is 128 queries of one head against its keys in
steps of 64, and a warpgroup holds its 64 queries, their scores and dq += ds k. Tiles and blocks
come in the order of the forward pass. Scores and dp are computed a second time, so that this sum,
too, belongs to one warpgroup.

A product of 64 x 64 reads two operands from shared memory as fast as that can deliver; queries held
in registers leave room for the loads. Bound: the tensor cores, 4 C + 2 V operations a score.
"""

# B batch  S sequence  H query heads  G key-value heads  C key width  V value width
# N keys a step

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.attention.mosaic_common import (
  ACC,
  MATRIX,
  ROWS,
  SLAB,
  Tile,
  add_product,
  along_rows,
  by_row,
  index,
  launch,
  load_keys,
  tiled,
)

TILE = Tile(step=64)


def query_grads(
  q_BSHC: jax.Array,
  k_BSGC: jax.Array,
  v_BSGV: jax.Array,
  do_BSHV: jax.Array,
  lse_BHS: jax.Array,
  delta_BHS: jax.Array,
  first_BS: jax.Array,
  last_BS: jax.Array | None = None,
  *,
  scale: float,
  tile: Tile = TILE,
  in_registers: bool = True,
) -> jax.Array:
  """dq. The arguments by row, from `lse_BHS` on, are padded to whole tiles.

  Args:
    last_BS: the last key that each query sees, nondecreasing, `first` - 1 where there is none; keys
      may then be of another number than queries. None: the query's own.
  """
  B, S, H, C = q_BSHC.shape
  G, V = v_BSGV.shape[2:]
  N, stages = tile.step, tile.stages
  num_tiles = pl.cdiv(S, ROWS)
  scale2 = scale * math.log2(math.e)
  dtype = q_BSHC.dtype

  def kernel(q_g, k_g, v_g, do_g, lse_g, delta_g, first_g, last_g, dq_g, *shared):
    q_s, do_s, k_s, v_s, q_full, k_full, v_full, k_empty, v_empty, left_s = shared
    b, h, t = (lax.axis_index(name) for name in ('row', 'head', 'tile'))
    group = lax.axis_index('warpgroup')
    base = (num_tiles - 1 - t) * ROWS
    begin = lax.div(first_g[b, base], jnp.int32(N))
    # behind the last key of a query
    stop = lambda query: query + 1 if last_g is None else last_g[b, query] + 1
    end = pl.cdiv(lax.min(base + ROWS, S) if last_g is None else stop(base + ROWS - 1), N)

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(240, action='increase')
      row = base + group * SLAB
      rows = pl.ds(row, SLAB)
      q_mine, do_mine = q_s.at[group], do_s.at[group]
      plgpu.copy_gmem_to_smem(q_g.at[b, rows, h], q_mine, q_full.at[group])
      plgpu.copy_gmem_to_smem(do_g.at[b, rows, h], do_mine, q_full.at[group])
      first = by_row(first_g.at[b, rows])
      last = None if last_g is None else by_row(last_g.at[b, rows])
      lse = along_rows(by_row(lse_g.at[b, h, rows]), N)
      delta = along_rows(by_row(delta_g.at[b, h, rows]), N)
      # steps with keys that some, or all, of this warpgroup's queries see
      mine_begin = lax.div(first_g[b, row], jnp.int32(N))
      mine_end = lax.min(pl.cdiv(stop(row + SLAB - 1), N), end)
      clear_begin = lax.min(pl.cdiv(first_g[b, row + SLAB - 1], N), mine_end)
      clear_end = lax.clamp(clear_begin, lax.div(stop(row), jnp.int32(N)), mine_end)
      left = None if in_registers else left_s.at[group]
      plgpu.barrier_wait(q_full.at[group])
      held = plgpu.load(q_mine, layout=MATRIX) if in_registers else q_mine

      def accumulate(dq_ref):
        def pass_by(step, _):
          slot = lax.rem(step - begin, jnp.int32(stages))
          for full, empty in ((k_full, k_empty), (v_full, v_empty)):
            plgpu.barrier_wait(full.at[slot])
            plgpu.barrier_arrive(empty.at[slot])

        def one_step(step, _, masked):
          slot = lax.rem(step - begin, jnp.int32(stages))

          def run(s_ref, dp_ref):
            plgpu.barrier_wait(k_full.at[slot])
            plgpu.wgmma(s_ref, held, k_s.at[slot].T)
            plgpu.barrier_wait(v_full.at[slot])
            plgpu.wgmma(dp_ref, do_mine, v_s.at[slot].T)
            # p is computed while dp is still under way
            p = jnp.exp2(plgpu.wgmma_accumulator_load(s_ref, wait_n=1) * scale2 - lse)
            if masked:
              key = index(p.shape, 1) + step * N
              until = index(p.shape, 0) + row if last is None else along_rows(last, N)
              p = jnp.where((key >= along_rows(first, N)) & (key <= until), p, 0)
            return p, dp_ref[...]

          block = ACC((SLAB, N), jnp.float32)
          p, dp = pl.run_scoped(run, block, block)
          plgpu.barrier_arrive(v_empty.at[slot])
          add_product(dq_ref, (p * (dp - delta)).astype(dtype), k_s.at[slot], left)
          plgpu.wgmma_wait(0)
          plgpu.barrier_arrive(k_empty.at[slot])

        masked, unmasked = (functools.partial(one_step, masked=m) for m in (True, False))
        lax.fori_loop(begin, mine_begin, pass_by, None)
        lax.fori_loop(mine_begin, clear_begin, masked, None)
        lax.fori_loop(clear_begin, clear_end, unmasked, None)
        lax.fori_loop(clear_end, mine_end, masked, None)
        lax.fori_loop(mine_end, end, pass_by, None)
        return dq_ref[...]

      dq = pl.run_scoped(accumulate, ACC((SLAB, C), jnp.float32))
      q_mine[...] = (dq * scale).astype(dtype)
      plgpu.commit_smem()
      # past row S, TMA drops what it is given
      plgpu.copy_smem_to_gmem(q_mine, dq_g.at[b, rows, h])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(24, action='decrease')
      rings = (k_s, k_full, k_empty), (v_s, v_full, v_empty)
      load_keys((k_g, v_g), rings, at=(b, lax.div(h, jnp.int32(H // G))), begin=begin, end=end)

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
  )(q_BSHC, k_BSGC, v_BSGV, do_BSHV, lse_BHS, delta_BHS, first_BS, last_BS)
