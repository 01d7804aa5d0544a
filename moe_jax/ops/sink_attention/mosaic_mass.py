"""Hopper kernel: how much attention each chosen entry got, summed over 64 heads of a query.

The first product of mosaic_forward.py again, with the logsumexp known: no running maximum and no
second product. Keys are the rows of the product, so that the sum over heads stays within a thread's
four; two warpgroups take every other block of 64 keys. Bound: reading the rows from L2.
"""

# T queries  H heads  R rows  C width  K slots of a query

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.sink_attention import mosaic_gather as mg
from moe_jax.ops.sink_attention.mosaic_forward import LOG2E
from moe_jax.ops.sink_attention.mosaic_plan import HEADS, Plan

_SLOTS = 2
_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def mass(
  q_THC: jax.Array,
  row_RC: jax.Array,
  run_T4: jax.Array,
  index_M: jax.Array,
  lse_TH: jax.Array,
  *,
  scale: float,
  native: bool = True,
) -> jax.Array:
  """float32 [H / 64, T, K]; blocks of 64 slots that a query does not use are left as they are.

  Args:
    run_T4: as mosaic_forward has it, with windows of no tokens.
  """
  T, H, C = q_THC.shape
  plan = Plan(T, H, index_M.size // T)
  columns = C // 2

  def kernel(
    q_g, row_g, run_g, index_g, lse_g, out_g,
    q_s, k_s, out_s, q_full, q_free, ready, free, landed,
  ):  # fmt: skip
    group = lax.axis_index('warpgroup')
    slot_of = lambda block: lax.rem(block, jnp.int32(_SLOTS))

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(232, action='increase')
      plgpu.barrier_wait(ready)

      def weigh(i, done):
        item = plan.item(i, run_g)
        plgpu.barrier_wait(q_full)
        lse = plgpu.load(lse_g.at[item.query, item.heads], layout=_COLUMN, optimized=False)
        # this one's blocks are those that come into its slot
        first = lax.rem(done + group, jnp.int32(_SLOTS))

        def block(n, _):
          mine = mg.opaque(group, native=native)
          j = first + n * _SLOTS
          mg.wait(landed, mine, lax.div(done + j, jnp.int32(_SLOTS)), native=native)

          def scores(ref):
            for c in range(2):
              plgpu.wgmma(ref, k_s.at[mine, c], q_s.at[c + 2 * (mine - group)].T)
            return ref[...]

          accumulator = plgpu.WGMMAAccumulatorRef((mg.BLOCK, HEADS), jnp.float32)
          s = pl.run_scoped(scores, accumulator) * (scale * LOG2E)
          plgpu.barrier_arrive(free.at[mine])
          p = jnp.exp2(s - lax.broadcast_in_dim(lse, s.shape, [1]))
          at = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA)
          p = jnp.where(at < item.live(j), p, 0.0)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          out_s[group] = p.sum(axis=1)
          plgpu.commit_smem()
          place = pl.ds(j * mg.BLOCK, mg.BLOCK)
          plgpu.copy_smem_to_gmem(out_s.at[group], out_g.at[item.head_block, item.query, place])

        share = lax.div(item.blocks - first + _SLOTS - 1, jnp.int32(_SLOTS))
        lax.fori_loop(0, lax.max(share, 0), block, None)
        plgpu.barrier_arrive(q_free)
        return done + item.blocks

      lax.fori_loop(0, plan.share(T), weigh, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(40, action='decrease')
      mg.start(landed, _SLOTS, native=native)
      plgpu.barrier_arrive(ready)

      def fetch(i, done):
        item = plan.item(i, run_g)

        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(q_free)

        for c in range(2):
          at = item.query, item.heads, pl.ds(c * columns, columns)
          plgpu.copy_gmem_to_smem(q_g.at[at], q_s.at[c], q_full)

        def block(j, _):
          slot = slot_of(done + j)

          @pl.when(done + j >= _SLOTS)
          def _():
            plgpu.barrier_wait(free.at[slot])

          plan.gather(item, j, row_g, index_g, k_s, landed, slot, native=native)

        lax.fori_loop(0, item.blocks, block, None)
        return done + item.blocks

      share = plan.share(T)
      done = lax.fori_loop(0, share, fetch, jnp.int32(0))
      drain = lambda j, _: plgpu.barrier_wait(free.at[slot_of(j)])
      lax.fori_loop(lax.max(done - _SLOTS, 0), done, drain, None)

      @pl.when(share > 0)
      def _():
        plgpu.barrier_wait(q_free)

  tile = lambda *shape: plgpu.SMEM(shape, q_THC.dtype, transforms=mg.TILING)
  return plan.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((plan.head_blocks, T, plan.num_slots), jnp.float32),
    scratch_types=(
      tile(2, HEADS, columns),
      tile(_SLOTS, 2, mg.BLOCK, columns),
      plgpu.SMEM((2, mg.BLOCK), jnp.float32),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(),
      plgpu.Barrier(num_barriers=_SLOTS),
      mg.arrivals(_SLOTS, native=native),
    ),
    name='sink_attention_mass',
  )(q_THC, row_RC, run_T4, index_M, lse_TH)
