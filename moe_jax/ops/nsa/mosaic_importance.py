"""Hopper kernel: how much of a group's attention each compressed block gets, summed over its heads.

The scores of `runs` again, of which the logsumexp is known by now, so that one product is all:

  block        256 rows of q (all heads of a group, of neighbouring queries), which stay in shared
               memory, times the keys that any of these queries sees, 128 at a time; two warpgroups
               multiply 64 keys each, a third loads
  product      keys are its rows and heads its columns, so the sum over heads is within a row: a
               query's columns lie in four neighbouring threads
  epilogue     exp2, summed; while one warpgroup does that the other one multiplies

Traffic: keys from L2; sums to device memory, 4 bytes for 2 M C operations. Bound: the tensor cores.
"""

# T queries  G key-value heads  M query heads of each  C width  R keys  N tiles of queries

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.attention.mosaic_common import compiler_params, tiled
from moe_jax.ops.grouped_matmul.mosaic_common import fill_ring, ring_slot
from moe_jax.ops.nsa.triton_runs import LOG2E

ROWS = 256
_KEYS, _COLUMNS, _SLAB, _STAGES = 128, 128, 64, 3


def importance(
  q_TGMC: jax.Array,
  k_RGC: jax.Array,
  first_T: jax.Array,
  count_T: jax.Array,
  lse_TGM: jax.Array,
  start: jax.Array,
  *,
  queries: int,
  scale: float,
) -> jax.Array:
  """float32 [queries, G, R or some more]: exp2(scores - lse) summed over the heads of a group.

  Of `queries` queries from `start` on, both multiples of 256 / M. What a query does not see, and
  queries past the last, may hold anything.

  Args:
    q_TGMC: M is 8, 16, 32, 64 or 128. lse_TGM: base 2.
    first_T: first key of a query's run, nondecreasing; so is `first_T + count_T`.
  """
  T, G, M, _ = q_TGMC.shape
  R, at_once = k_RGC.shape[0], ROWS // M
  tiles, pad = pl.cdiv(T, at_once), -T % at_once
  # TMA wants a row of sums in multiples of 16 bytes, and keys in eights
  width = pl.cdiv(R, 8) * 8
  k_RGC = jnp.pad(k_RGC, ((0, width - R), (0, 0), (0, 0)))
  grouped = lambda a, fill: jnp.pad(a, (0, pad), constant_values=fill).reshape(tiles, at_once)
  first_N = grouped(first_T, R).min(1) // _KEYS
  end_N = pl.cdiv(grouped(first_T + count_T, 0).max(1), _KEYS)
  range_N2 = jnp.stack([first_N, end_N], 1).astype(jnp.int32)
  lse_GX = jnp.pad(jnp.swapaxes(lse_TGM, 0, 1), ((0, 0), (0, pad), (0, 0))).reshape(G, -1)
  start_tile = start.reshape(1) // at_once

  def kernel(q_g, k_g, lse_g, range_g, start_g, out_g, q_s, k_s, lse_s, out_s, *barriers):
    q_full, full, empty = barriers
    group, warpgroup = lax.axis_index('group'), lax.axis_index('warpgroup')
    # the longest runs first, so that the last blocks to start are short
    here = queries // at_once - 1 - lax.axis_index('tile')
    tile = start_g[0] + here
    known = lax.min(tile, tiles - 1)
    begin, end = range_g[known, 0], range_g[known, 1]
    steps = jnp.where(tile < tiles, lax.max(end - begin, 0), 0)

    @pl.when(warpgroup < 2)
    def _():
      plgpu.set_max_registers(232, action='increase')
      plgpu.barrier_wait(q_full)
      halves = range(0, ROWS, _COLUMNS)
      column = plgpu.Layout.WGMMA.reduce(0)
      lses = [plgpu.load(lse_s.at[pl.ds(h, _COLUMNS)], layout=column) for h in halves]
      mine = pl.ds(pl.multiple_of(warpgroup * _SLAB, _SLAB), _SLAB)

      def step(i, _):
        slot = ring_slot(i, _STAGES)
        plgpu.barrier_wait(full.at[slot])

        def products(accs):
          for acc, h in zip(accs, halves, strict=True):
            plgpu.wgmma(acc, k_s.at[slot, mine], q_s.at[pl.ds(h, _COLUMNS)].T)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          for n, acc in enumerate(accs):
            # the other half is still being multiplied
            dot = plgpu.wgmma_accumulator_load(acc, wait_n=len(accs) - 1 - n)
            p = jnp.exp2(dot * (scale * LOG2E) - lax.broadcast_in_dim(lses[n], dot.shape, [1]))
            for m in range(_COLUMNS // M):
              out_s[warpgroup, n * (_COLUMNS // M) + m] = p[:, m * M : (m + 1) * M].sum(axis=1)

        pl.run_scoped(products, [plgpu.WGMMAAccumulatorRef((_SLAB, _COLUMNS)) for _ in halves])
        plgpu.barrier_arrive(empty.at[slot])
        plgpu.commit_smem()
        key = pl.multiple_of((begin + i) * _KEYS + warpgroup * _SLAB, _SLAB)
        at = pl.ds(here * at_once, at_once), group, pl.ds(key, _SLAB)
        # past the last key, TMA drops what it is given
        plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out_g.at[at])

      lax.fori_loop(0, steps, step, None)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _():
      plgpu.set_max_registers(40, action='decrease')
      for i in range(at_once):
        query, rows = lax.min(tile * at_once + i, T - 1), pl.ds(i * M, M)
        plgpu.copy_gmem_to_smem(q_g.at[query, group], q_s.at[rows], q_full)
      rows = pl.ds(pl.multiple_of(known * ROWS, ROWS), ROWS)
      plgpu.copy_gmem_to_smem(lse_g.at[group, rows], lse_s, q_full)

      def load(i, slot):
        keys = pl.ds(pl.multiple_of((begin + i) * _KEYS, _KEYS), _KEYS)
        plgpu.copy_gmem_to_smem(k_g.at[keys, group], k_s.at[slot], full.at[slot])

      fill_ring(steps, _STAGES, empty, load)

  C, dtype = q_TGMC.shape[-1], q_TGMC.dtype
  launch: Callable = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((queries, G, width), jnp.float32),
    scratch_types=(
      tiled((ROWS, C), dtype),
      tiled((_STAGES, _KEYS, C), dtype),
      plgpu.SMEM((ROWS,), jnp.float32),
      plgpu.SMEM((2, at_once, _SLAB), jnp.float32),
      plgpu.Barrier(num_arrivals=at_once + 1),
      plgpu.Barrier(num_barriers=_STAGES),
      plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
    ),
    grid=(queries // at_once, G),
    grid_names=('tile', 'group'),
    num_threads=3,
    thread_name='warpgroup',
    kernel_name='nsa_importance',
    # no barriers around each store of sums: those of commit_smem and of the wait before are enough
    compiler_params=compiler_params(),
  )
  return launch(q_TGMC, k_RGC, lse_GX, range_N2, start_tile)
