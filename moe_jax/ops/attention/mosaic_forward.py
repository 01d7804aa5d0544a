"""Hopper kernel: causal attention within documents, forward.

  block        a list of tiles (schedule.py), one after another
  tile         128 queries of one head against blocks of 128 keys and values
  registers    a warpgroup holds the scores of its 64 queries, and their output's sums
  turns        a warpgroup queues two products, probabilities x values of this block and queries x
               keys of the next, and passes the tensor cores on: the softmax of one is done during
               the products of the other
  next tile    its keys and values are loaded as stages come free, its queries once the last scores
               are made, and its first scores are queued before this tile's output is written

A query sees the keys [first, itself]. `first` is nondecreasing along a row, so a tile visits the
blocks from its first query's `first` to its end, and masks only those that hold a border.

Traffic from device memory: queries and the output once; keys and values once as long as a head's
fit into L2. Bound: the chip's power, which takes the clock down to 1.55 to 1.7 GHz, where the
tensor cores could do 840 to 920 TFLOP/s; 2 (C + V) operations a score.
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
  compiler_params,
  index,
  tiled,
)
from moe_jax.ops.attention.schedule import lists_of_tiles
from moe_jax.ops.backends import SMEM_BYTES, num_sms
from moe_jax.ops.mosaic_inline import scale_rows

# a row's running maximum stays until it is exceeded by this, in powers of 2: no score is then worth
# more than 256, which neither bfloat16 nor float32 minds, and sums are hardly ever scaled
_SLACK = 8.0


def tile_of(key_width: int, value_width: int) -> Tile:
  """The largest whose operands, and half an output, fit into shared memory."""
  tile = Tile(step=128)
  fixed = 2 * SLAB * (2 * key_width + 2 * SLAB + 4) + 1024
  stages = 2 * tile.stages * tile.step * (key_width + value_width)
  return tile if fixed + stages <= SMEM_BYTES else Tile(step=64)


def forward(
  q_BSHC: jax.Array,
  k_BSGC: jax.Array,
  v_BSGV: jax.Array,
  first_BS: jax.Array,
  sink_H: jax.Array | None,
  last_BS: jax.Array | None = None,
  *,
  scale: float,
  tile: Tile | None = None,
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
  tile = tile or tile_of(C, V)
  N, stages = tile.step, tile.stages
  num_tiles = pl.cdiv(S, ROWS)
  table = lists_of_tiles(B * H, num_tiles, num_sms())
  # the softmax is of base 2, which the chip has an instruction for
  base2 = math.log2(math.e)
  dtype = q_BSHC.dtype

  def kernel(q_g, k_g, v_g, first_g, last_g, sink_g, table_g, o_g, lse_g, *shared):
    q_s, o_s, k_s, v_s, lse_s, q_full, k_full, v_full, k_empty, v_empty, turn, p_s = shared
    block, group = lax.axis_index('block'), lax.axis_index('warpgroup')
    slot_of = lambda n: lax.rem(n, jnp.int32(stages))

    def item_of(n):
      """The n-th of this block's tiles; negative behind the last of them."""
      return table_g[block, lax.min(n, jnp.int32(table.shape[1] - 1))]

    def place(item):
      """Row of the batch, head, and first query; of some tile if there is none."""
      head, t = lax.div(lax.max(item, 0), jnp.int32(num_tiles)), lax.rem(item, jnp.int32(num_tiles))
      return lax.div(head, jnp.int32(H)), lax.rem(head, jnp.int32(H)), lax.max(t, 0) * ROWS

    def stop(b, query):
      """Behind the last key of a query."""
      return query + 1 if last_g is None else last_g[b, query] + 1

    def span(item):
      """The tile's blocks of keys, of which there is always one."""
      b, _, base = place(item)
      begin = lax.div(first_g[b, base], jnp.int32(N))
      most = lax.min(base + ROWS, S) if last_g is None else stop(b, base + ROWS - 1)
      return begin, lax.max(pl.cdiv(most, N), begin + 1)

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(240, action='increase')
      full = lambda shape, x, layout: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)
      turns = Turns(group, turn)

      def load_queries(item):
        b, h, base = place(item)
        rows = pl.ds(base + group * SLAB, SLAB)
        plgpu.copy_gmem_to_smem(q_g.at[b, rows, h], q_s.at[group], q_full.at[group])

      def await_stage(full_barrier, n):
        plgpu.barrier_wait(full_barrier.at[slot_of(n)])

      def release(empty_barrier, n):
        plgpu.barrier_arrive(empty_barrier.at[slot_of(n)])

      def add_scores(s_ref, n):
        plgpu.wgmma(s_ref, q_s.at[group], k_s.at[slot_of(n)].T)

      def scores(n):
        def run(s_ref):
          add_scores(s_ref, n)
          turns.pass_on()
          return s_ref[...]

        return pl.run_scoped(run, ACC((SLAB, N), jnp.float32))

      def add_values_then_scores(sums, p, n):
        """Both products in one turn, the second not waiting for the first."""
        v_slot = v_s.at[slot_of(n)]
        if not in_registers:

          def product(ref):
            add_product(ref, p, v_slot, p_s.at[group])
            return ref[...]

          return sums + pl.run_scoped(product, ACC((SLAB, V), jnp.float32)), scores(n + 1)

        def run(sums_ref, s_ref):
          plgpu.wgmma(sums_ref, p, v_slot)
          add_scores(s_ref, n + 1)
          turns.pass_on()

        return accumulated(run, sums, full((SLAB, N), 0, MATRIX))

      def borders(item):
        """What a tile needs to know of its queries' keys, read a tile ahead."""
        b, _, base = place(item)
        row = base + group * SLAB
        begin, end = span(item)
        last = end - 1
        # blocks with a key before the `first` of some query, with all keys seen, with later keys
        clear_begin = lax.min(pl.cdiv(first_g[b, row + SLAB - 1], N), last)
        clear_end = lax.div(row if last_g is None else stop(b, row), jnp.int32(N))
        clear_end = lax.clamp(clear_begin, clear_end, last)
        rows = pl.ds(row, SLAB)
        final = None if last_g is None else by_row(last_g.at[b, rows])
        return begin, clear_begin, clear_end, last, by_row(first_g.at[b, rows]), final

      def one_tile(state):
        t, item, following, before, s, (begin, clear_begin, clear_end, last, first, final) = state
        b, h, base = place(item)
        row = base + group * SLAB
        rows = pl.ds(row, SLAB)
        goes_on = following >= 0
        ahead, third = borders(following), item_of(t + 2)
        # which of all the blocks of keys that this block meets
        nth = lambda step: before + step - begin

        def softmax(carry, step, masked):
          s, largest, total, sums = carry
          if masked:
            key = index(s.shape, 1) + step * N
            until = index(s.shape, 0) + row if final is None else along_rows(final, N)
            s = jnp.where((key >= along_rows(first, N)) & (key <= until), s, -jnp.inf)
          new = s.max(axis=1) * (scale * base2)
          new = jnp.where(new > largest + _SLACK, new, largest)
          shrink = jnp.exp2(largest - new)
          p = jnp.exp2(s * (scale * base2) - along_rows(new, N))
          sums = scale_rows(sums, shrink, native=in_registers)
          total = total * shrink + p.sum(axis=1)
          # what the products need comes before the turn, the rest may come during it
          p, new, sums = lax.optimization_barrier((p.astype(dtype), new, sums))
          return p, new, total, sums

        def one_block(step, carry, masked):
          p, largest, total, sums = softmax(carry, step, masked)
          n = nth(step)
          await_stage(v_full, n)
          await_stage(k_full, n + 1)
          turns.wait()
          sums, s = add_values_then_scores(sums, p, n)
          release(v_empty, n)
          release(k_empty, n + 1)
          return s, largest, total, sums

        def blocks(start, stop, carry, *, masked):
          return lax.fori_loop(start, stop, functools.partial(one_block, masked=masked), carry)

        # finite, so that a row all masked so far gives zeros, not NaN; a sink is a score like any
        largest = full((SLAB,), -1e30 if sink_g is None else sink_g[h] * base2, BY_ROW)
        total = full((SLAB,), 0 if sink_g is None else 1, BY_ROW)
        carry = s, largest, total, full((SLAB, V), 0, MATRIX)
        carry = blocks(begin, clear_begin, carry, masked=True)
        carry = blocks(clear_begin, clear_end, carry, masked=False)
        carry = blocks(clear_end, last, carry, masked=True)
        # the whole warpgroup has read these queries, and TMA the last output
        await_warpgroup()
        pl.when(goes_on)(lambda: load_queries(following))
        p, largest, total, sums = softmax(carry, last, True)
        n = nth(last)
        await_stage(v_full, n)

        @pl.when(goes_on)
        def _():
          await_stage(k_full, n + 1)
          plgpu.barrier_wait(q_full.at[group])

        turns.wait()
        # behind the last tile these are scores of whatever lies there, and nobody's
        sums, s = add_values_then_scores(sums, p, n)
        release(v_empty, n)
        pl.when(goes_on)(lambda: release(k_empty, n + 1))

        o = (sums * along_rows(1 / total, V)).astype(dtype)
        lse_s[group] = largest + jnp.log2(total)
        for c in range(0, V, SLAB):
          if c:
            await_warpgroup()
          o_s[group] = o[:, c : c + SLAB]
          plgpu.commit_smem()
          # past row S, TMA drops what it is given
          plgpu.copy_smem_to_gmem(o_s.at[group], o_g.at[b, rows, h, pl.ds(c, SLAB)])
        plgpu.copy_smem_to_gmem(lse_s.at[group], lse_g.at[b, h, rows])
        return t + 1, following, third, n + 1, s, ahead

      item = item_of(jnp.int32(0))
      load_queries(item)
      ahead = borders(item)
      plgpu.barrier_wait(q_full.at[group])
      await_stage(k_full, jnp.int32(0))
      pl.when(group == 1)(turns.wait)
      s = scores(jnp.int32(0))
      release(k_empty, jnp.int32(0))
      state = jnp.int32(0), item, item_of(jnp.int32(1)), jnp.int32(0), s, ahead
      lax.while_loop(lambda state: state[1] >= 0, one_tile, state)
      # group 1 took one turn less when it began
      pl.when(group == 0)(turns.wait)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(24, action='decrease')
      rings = (k_g, k_s, k_full, k_empty), (v_g, v_s, v_full, v_empty)

      def one_tile(state):
        t, item, following, before, (begin, end) = state
        b, h, _ = place(item)
        ahead, third = span(following), item_of(t + 2)

        def load(step, _):
          n = before + step - begin
          keys = b, pl.ds(step * N, N), lax.div(h, jnp.int32(H // G))
          for ref, ring, full, empty in rings:

            @pl.when(n >= stages)
            def _(empty=empty):
              plgpu.barrier_wait(empty.at[slot_of(n)])

            # past the last row TMA writes zeros
            plgpu.copy_gmem_to_smem(ref.at[keys], ring.at[slot_of(n)], full.at[slot_of(n)])

        lax.fori_loop(begin, end, load, None)
        return t + 1, following, third, before + end - begin, ahead

      item = item_of(jnp.int32(0))
      state = jnp.int32(0), item, item_of(jnp.int32(1)), jnp.int32(0), span(item)
      loaded = lax.while_loop(lambda state: state[1] >= 0, one_tile, state)[3]

      # the last releases must have arrived before the block, and its barriers, may end
      def drain(n, _):
        for _, _, _, empty in rings:
          plgpu.barrier_wait(empty.at[slot_of(n)])

      lax.fori_loop(lax.max(loaded - stages, 0), loaded, drain, None)

  return plgpu.kernel(
    kernel,
    grid=(len(table),),
    grid_names=('block',),
    num_threads=3,
    thread_name='warpgroup',
    kernel_name='attention_forward',
    compiler_params=compiler_params(),
    out_type=(
      jax.ShapeDtypeStruct((B, S, H, V), dtype),
      jax.ShapeDtypeStruct((B, H, num_tiles * ROWS), jnp.float32),
    ),
    scratch_types=(
      tiled((2, SLAB, C), dtype),
      tiled((2, SLAB, SLAB), dtype),
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
  )(q_BSHC, k_BSGC, v_BSGV, first_BS, last_BS, sink_H, jnp.asarray(table))
