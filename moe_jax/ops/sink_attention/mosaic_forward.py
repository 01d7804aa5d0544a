"""Hopper kernel: attention of 64 heads of one query over the rows that it names, keys and values.

  query        its 64 heads are the 64 rows of every product; blocks of 64 keys, gathered
  block        one per SM, persistent: 2 warpgroups multiply and a third gathers into 2 slots of
               64 x 512, running ahead across queries
  scores       each warpgroup makes those of 32 of the 64 keys; maxima meet in shared memory
  values       each warpgroup sums 256 of the 512 columns, over all 64 keys, in registers; so the
               probabilities, in bfloat16, cross in shared memory too
  sink         the first maximum, and a sum of 1, of the running softmax
  between      the next query arrives during the last product, and outputs leave from where the last
               keys were

Traffic: 1024 bytes a key for 4 * 64 * 512 operations, out of L2 where neighbouring queries share
keys: 128 a byte, so an L2 that delivers 5.5 TB/s allows 700 TFLOP/s. Then shared memory: with 64
rows a product reads its operands at nearly the rate at which they are multiplied.
"""

# T queries  H heads  R rows  C width  K slots of a query

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.sink_attention import mosaic_gather as mg
from moe_jax.ops.sink_attention.mosaic_plan import HEADS, Plan

LOG2E = math.log2(math.e)
_NO_SCORE = -1e30
_SLOTS = 2
_HALF = mg.BLOCK // 2
_ROW = plgpu.Layout.WGMMA.reduce(1)


def forward(
  q_THC: jax.Array,
  row_RC: jax.Array,
  sink_H: jax.Array,
  run_T4: jax.Array,
  index_M: jax.Array | None,
  *,
  scale: float,
  native: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Outputs [T, H, C] and the base-2 logsumexp, sink included, [T, H].

  Args:
    run_T4: first row and count of a query's window, then of its entries.
    index_M: [T * K], added to the first entry's row; without it a query's entries are neighbours.
  """
  T, H, C = q_THC.shape
  plan = Plan(T, H, 0 if index_M is None else index_M.size // T)
  columns = C // 2
  to_log2 = scale * LOG2E

  def kernel(
    q_g, row_g, sink_g, run_g, index_g, o_g, lse_g,
    q_s, k_s, p_s, row_s, sum_s, lse_s, q_full, q_free, ready, free, met, crossed, landed,
  ):  # fmt: skip
    group = lax.axis_index('warpgroup')
    turn_of = lambda block: lax.div(block, jnp.int32(_SLOTS))
    slot_of = lambda block: lax.rem(block, jnp.int32(_SLOTS))

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(232, action='increase')
      plgpu.barrier_wait(ready)
      own_columns = pl.ds(group * columns, columns)

      def attend(i, done):
        item = plan.item(i, run_g)
        plgpu.barrier_wait(q_full)
        top = plgpu.load(sink_g.at[item.heads], layout=_ROW, optimized=False) * LOG2E
        # the sink's own share of the sum counts once
        total = jnp.full((HEADS,), 1.0, jnp.float32) * (group == 0).astype(jnp.float32)
        total = plgpu.layout_cast(total, _ROW)
        acc = plgpu.layout_cast(jnp.zeros((HEADS, columns), jnp.float32), plgpu.Layout.WGMMA)

        def block(j, carry):
          acc, top, total = carry
          mine = mg.opaque(group, native=native)
          zero = mine - group
          keys = pl.ds(mine * _HALF, _HALF)
          slot = slot_of(done + j)
          mg.wait(landed, slot, turn_of(done + j), native=native)

          def scores(ref):
            for c in range(2):
              plgpu.wgmma(ref, q_s.at[c + 2 * zero], k_s.at[slot, c, keys].T)
            return ref[...]

          s = (
            pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((HEADS, _HALF), jnp.float32)) * to_log2
          )

          @pl.when(j == item.blocks - 1)
          def _():
            plgpu.barrier_arrive(q_free)

          at = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
          s = jnp.where(at < item.live(j) - group * _HALF, s, _NO_SCORE)
          most = s.max(axis=1)
          row_s[group] = most
          meet(met)
          other = plgpu.load(row_s.at[1 - group], layout=_ROW, optimized=False)
          new_top = jnp.maximum(top, jnp.maximum(most, other))
          p = jnp.exp2(s - _across(new_top, s))
          p_s[:, keys] = p.astype(p_s.dtype)
          plgpu.commit_smem()
          plgpu.barrier_arrive(crossed)
          rescale = jnp.exp2(top - new_top)
          total = total * rescale + p.sum(axis=1)
          acc = acc * _across(rescale, acc)
          plgpu.barrier_wait(crossed)
          values = lambda ref: plgpu.wgmma(ref, p_s, k_s.at[slot, mine])
          acc = mg.accumulate(acc, values, native=native)

          # the last block's slot has another use yet
          @pl.when(j < item.blocks - 1)
          def _():
            plgpu.barrier_arrive(free.at[slot])

          return acc, new_top, total

        acc, top, total = lax.fori_loop(0, item.blocks, block, (acc, top, total))
        sum_s[group] = total
        meet(met)
        total += plgpu.load(sum_s.at[1 - group], layout=_ROW, optimized=False)
        # nobody else reads these columns of the last keys
        slot = slot_of(done + item.blocks - 1)
        k_s[slot, group] = (acc * _across(1 / total, acc)).astype(k_s.dtype)
        lse_s[group] = top + jnp.log(total) * LOG2E
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_s.at[slot, group], o_g.at[item.query, item.heads, own_columns])

        @pl.when(group == 0)
        def _():
          plgpu.copy_smem_to_gmem(lse_s.at[group], lse_g.at[item.query, item.heads])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(free.at[slot])
        return done + item.blocks

      lax.fori_loop(0, plan.share(T), attend, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(40, action='decrease')
      mg.start(landed, _SLOTS, native=native)
      plgpu.barrier_arrive(ready)

      def fetch(i, done):
        item = plan.item(i, run_g)

        def block(j, _):
          slot = slot_of(done + j)

          @pl.when(done + j >= _SLOTS)
          def _():
            plgpu.barrier_wait(free.at[slot])

          plan.gather(item, j, row_g, index_g, k_s, landed, slot, native=native)

          @pl.when(j == 0)
          def _():
            @pl.when(i > 0)
            def _():
              plgpu.barrier_wait(q_free)

            for c in range(2):
              at = item.query, item.heads, pl.ds(c * columns, columns)
              plgpu.copy_gmem_to_smem(q_g.at[at], q_s.at[c], q_full)

        lax.fori_loop(0, item.blocks, block, None)
        return done + item.blocks

      done = lax.fori_loop(0, plan.share(T), fetch, jnp.int32(0))
      # the last releases must have arrived before the block, and its barriers, may end
      drain = lambda j, _: plgpu.barrier_wait(free.at[slot_of(j)])
      lax.fori_loop(lax.max(done - _SLOTS, 0), done, drain, None)

      @pl.when(done > 0)
      def _():
        plgpu.barrier_wait(q_free)

  tile = lambda *shape: plgpu.SMEM(shape, q_THC.dtype, transforms=mg.TILING)
  return plan.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((T, H, C), q_THC.dtype),
      jax.ShapeDtypeStruct((T, H), jnp.float32),
    ),
    scratch_types=(
      tile(2, HEADS, columns),
      tile(_SLOTS, 2, mg.BLOCK, columns),
      tile(HEADS, mg.BLOCK),
      plgpu.SMEM((2, HEADS), jnp.float32),
      plgpu.SMEM((2, HEADS), jnp.float32),
      plgpu.SMEM((2, HEADS), jnp.float32),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(),
      plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      mg.arrivals(_SLOTS, native=native),
    ),
    name='sink_attention_forward',
  )(q_THC, row_RC, sink_H, run_T4, plan.index(index_M))


def meet(barrier) -> None:
  """Both warpgroups that multiply are here, and what they wrote can be read."""
  plgpu.barrier_arrive(barrier)
  plgpu.barrier_wait(barrier)


def _across(row_H: jax.Array, like: jax.Array) -> jax.Array:
  return lax.broadcast_in_dim(row_H, like.shape, [0])
