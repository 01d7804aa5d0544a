"""Hopper kernel: causal attention within documents, forward.

  tile         128 queries of one head against blocks of 128 keys and values
  registers    a warpgroup holds the scores of its 64 queries, and their output's sums
  turns        a warpgroup queues two products, probabilities x values of this block and queries x
               keys of the next, and passes the tensor cores on: the softmax of one is done during
               the products of the other
  order        the last tile of a head first: it has the most keys

A query sees the keys [first, itself]. `first` is nondecreasing along a row, so a tile visits the
blocks from its first query's `first` to its end, and masks only those that hold a border.

Traffic from device memory: queries and the output once; keys and values once as long as a head's
fit into L2. Bound: the tensor cores under the chip's power limit, 2 (C + V) operations a score.
"""

# B batch  S sequence  H query heads  G key-value heads  C key width  V value width  N keys a step

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.attention.mosaic_common import (
  ACC,
  BY_ROW,
  MATRIX,
  ROWS,
  SLAB,
  Tile,
  Turns,
  accumulated,
  add_product,
  along_rows,
  await_warpgroup,
  by_row,
  index,
  launch,
  load_keys,
  tiled,
)

TILE = Tile(step=128)


def forward(
  q_BSHC: jax.Array,
  k_BSGC: jax.Array,
  v_BSGV: jax.Array,
  first_BS: jax.Array,
  sink_H: jax.Array | None,
  last_BS: jax.Array | None = None,
  *,
  scale: float,
  tile: Tile = TILE,
  in_registers: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """The output, and the base-2 logarithm of each row's sum with S padded to whole tiles.

  Args:
    first_BS: padded to whole tiles too.
    last_BS: the last key that each query sees, nondecreasing, `first` - 1 where there is none, of
      whom nothing is defined; keys may then be of another number. None: the query's own.
    in_registers: whether probabilities stay there; the interpreter cannot.
  """
  B, S, H, C = q_BSHC.shape
  G, V = v_BSGV.shape[2:]
  N, stages = tile.step, tile.stages
  num_tiles = pl.cdiv(S, ROWS)
  # the softmax is of base 2, which the chip has an instruction for
  base2 = math.log2(math.e)
  dtype = q_BSHC.dtype

  def kernel(q_g, k_g, v_g, first_g, last_g, sink_g, o_g, lse_g, *shared):
    (q_s, o_s), k_s, v_s, lse_s, q_full, k_full, v_full, k_empty, v_empty, turn, p_s = shared
    b, h, t = (lax.axis_index(name) for name in ('row', 'head', 'tile'))
    group = lax.axis_index('warpgroup')
    base = (num_tiles - 1 - t) * ROWS
    begin = lax.div(first_g[b, base], jnp.int32(N))
    # behind the last key of a query
    stop = lambda query: query + 1 if last_g is None else last_g[b, query] + 1
    end = pl.cdiv(lax.min(base + ROWS, S) if last_g is None else stop(base + ROWS - 1), N)
    end = lax.max(end, begin + 1)
    last = end - 1

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(240, action='increase')
      row = base + group * SLAB
      rows = pl.ds(row, SLAB)
      plgpu.copy_gmem_to_smem(q_g.at[b, rows, h], q_s.at[group], q_full.at[group])
      full = lambda shape, x, layout: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)
      slot_of = lambda step: lax.rem(step - begin, jnp.int32(stages))
      turns = Turns(group, turn)
      first = by_row(first_g.at[b, rows])
      final = None if last_g is None else by_row(last_g.at[b, rows])
      # blocks with a key before the `first` of some query, with all keys seen, with later keys
      clear_begin = lax.min(pl.cdiv(first_g[b, row + SLAB - 1], N), last)
      clear_end = lax.div(row if last_g is None else stop(row), jnp.int32(N))
      clear_end = lax.clamp(clear_begin, clear_end, last)

      def await_stage(full_barrier, step):
        plgpu.barrier_wait(full_barrier.at[slot_of(step)])

      def release(empty_barrier, step):
        plgpu.barrier_arrive(empty_barrier.at[slot_of(step)])

      def add_scores(s_ref, step):
        plgpu.wgmma(s_ref, q_s.at[group], k_s.at[slot_of(step)].T)

      def scores(step):
        def run(s_ref):
          add_scores(s_ref, step)
          turns.pass_on()
          return s_ref[...]

        s = pl.run_scoped(run, ACC((SLAB, N), jnp.float32))
        release(k_empty, step)
        return s

      def add_values(sums, p, step):
        v_slot = v_s.at[slot_of(step)]
        if in_registers:
          (sums,) = accumulated(lambda ref: plgpu.wgmma(ref, p, v_slot), sums)
        else:

          def run(ref):
            add_product(ref, p, v_slot, p_s.at[group])
            return ref[...]

          sums = sums + pl.run_scoped(run, ACC((SLAB, V), jnp.float32))
        release(v_empty, step)
        return sums

      def add_values_then_scores(sums, p, step):
        """Both products in one turn, the second not waiting for the first."""
        if not in_registers:
          return add_values(sums, p, step), scores(step + 1)

        def run(sums_ref, s_ref):
          plgpu.wgmma(sums_ref, p, v_s.at[slot_of(step)])
          add_scores(s_ref, step + 1)
          turns.pass_on()

        sums, s = accumulated(run, sums, full((SLAB, N), 0, MATRIX))
        release(v_empty, step)
        release(k_empty, step + 1)
        return sums, s

      def softmax(carry, step, masked):
        s, largest, total, sums = carry
        if masked:
          key = index(s.shape, 1) + step * N
          until = index(s.shape, 0) + row if final is None else along_rows(final, N)
          s = jnp.where((key >= along_rows(first, N)) & (key <= until), s, -jnp.inf)
        new = jnp.maximum(largest, s.max(axis=1) * (scale * base2))
        shrink = jnp.exp2(largest - new)
        p = jnp.exp2(s * (scale * base2) - along_rows(new, N))
        sums = sums * along_rows(shrink, V)
        total = total * shrink + p.sum(axis=1)
        # what the products need comes before the turn, the rest may come during it
        p, new, sums = lax.optimization_barrier((p.astype(dtype), new, sums))
        return p, new, total, sums

      def one_block(step, carry, masked):
        p, largest, total, sums = softmax(carry, step, masked)
        await_stage(v_full, step)
        await_stage(k_full, step + 1)
        turns.wait()
        sums, s = add_values_then_scores(sums, p, step)
        return s, largest, total, sums

      def blocks(start, stop, carry, *, masked):
        return lax.fori_loop(start, stop, functools.partial(one_block, masked=masked), carry)

      plgpu.barrier_wait(q_full.at[group])
      await_stage(k_full, begin)
      pl.when(group == 1)(turns.wait)
      # finite, so that a row all masked so far gives zeros and not NaN; a sink is a score like any
      largest = full((SLAB,), -1e30 if sink_g is None else sink_g[h] * base2, BY_ROW)
      total = full((SLAB,), 0 if sink_g is None else 1, BY_ROW)
      carry = scores(begin), largest, total, full((SLAB, V), 0, MATRIX)
      carry = blocks(begin, clear_begin, carry, masked=True)
      carry = blocks(clear_begin, clear_end, carry, masked=False)
      carry = blocks(clear_end, last, carry, masked=True)
      p, largest, total, sums = softmax(carry, last, True)
      await_stage(v_full, last)
      turns.wait()
      sums = add_values(sums, p, last)
      turns.pass_on()
      # group 1 took one turn less when it began
      pl.when(group == 0)(turns.wait)

      # the output may lie over queries that another warp has read
      await_warpgroup()
      o_s[group] = (sums * along_rows(1 / total, V)).astype(dtype)
      lse_s[group] = largest + jnp.log2(total)
      plgpu.commit_smem()
      # past row S, TMA drops what it is given
      plgpu.copy_smem_to_gmem(o_s.at[group], o_g.at[b, rows, h])
      plgpu.copy_smem_to_gmem(lse_s.at[group], lse_g.at[b, h, rows])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(24, action='decrease')
      rings = (k_s, k_full, k_empty), (v_s, v_full, v_empty)
      load_keys((k_g, v_g), rings, at=(b, lax.div(h, jnp.int32(H // G))), begin=begin, end=end)

  return launch(
    kernel,
    grid=(B, H, num_tiles),
    name='attention_forward',
    out_type=(
      jax.ShapeDtypeStruct((B, S, H, V), dtype),
      jax.ShapeDtypeStruct((B, H, num_tiles * ROWS), jnp.float32),
    ),
    scratch_types=(
      # a warpgroup writes its output when neither needs the queries under it any more
      plgpu.RefUnion(tiled((2, SLAB, C), dtype), tiled((2, SLAB, V), dtype)),
      tiled((stages, N, C), dtype),
      tiled((stages, N, V), dtype),
      plgpu.SMEM((2, SLAB), jnp.float32),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      None if in_registers else plgpu.Barrier(num_barriers=2),
      None if in_registers else tiled((2, SLAB, N), dtype),
    ),
  )(q_BSHC, k_BSGC, v_BSGV, first_BS, last_BS, sink_H)
