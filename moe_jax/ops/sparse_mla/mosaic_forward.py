"""Hopper kernel: attention of 64 heads of one query over latents it names, or over a run of them.

  block        one query, 64 heads (fewer are padded), 4 warpgroups, one block per SM
  load         warpgroup 3 brings 64 latents at a time into one of two buffers of 64 x 576: gathers
               rows (mosaic_gather.py), or lets TMA copy consecutive ones, in pairs of blocks with
               128 heads once for both
  scores       warpgroup 2: s = q k over 576 columns, the running maximum, p = exp2(s - max); p
               takes the place of the rope columns of its own buffer, which nothing reads any more
  values       warpgroups 0 and 1: o = o * rescale + p v, half of the 512 columns each, in registers

Scores of one buffer run while values of the other do, so the tensor cores always have one of the
two; a buffer is refilled 128 columns at a time, as soon as the warpgroup that reads them lets go.

Traffic: each block reads 1152 bytes a key, mostly from L2, for 64 x 1088 x 2 operations. Bound:
not that, as queries that all name the same keys take as long, but the chain of one block's load,
scores, softmax and values, of which two are under way; shared memory has no room for a third.
Fewer than 64 heads take as long as 64.
"""

# N queries (or parts of them)  H heads  R rows of q  V latent (value) width  C rope width
# S keys  K slots of a query

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.mosaic_inline import scale_rows
from moe_jax.ops.sparse_mla import mosaic_gather as mg

HEADS = 64
ROPE = 64
_NO_SCORE = -1e30
# the running maximum stays until it is exceeded by this, in powers of 2, so that sums are hardly
# ever scaled; no probability is then above 256
_SLACK = 8.0
_BUFFERS = 2
_ROW = plgpu.Layout.WGMMA.reduce(1)


class Keys(NamedTuple):
  """What each of N queries attends to: rows of the latents and of their rotary parts."""

  latent_SV: jax.Array
  rope_SC: jax.Array
  # [N, K]: row of each slot, those from count on included; or [N]: the first of consecutive rows
  row: jax.Array
  count_N: jax.Array


def attend(
  q_RV: jax.Array, q_rope_RC: jax.Array, keys: Keys, *, splits: int, scale: float, native: bool
) -> tuple[jax.Array, jax.Array]:
  """Outputs [N*H, V] and their base-2 logsumexp [N*H].

  Args:
    splits: how many of the N share a query, one after the other; q has N / splits * H rows.
    native: False in the interpreter, which knows neither inlined code nor resumed accumulators.
  """
  (num_rows, V), N = q_RV.shape, keys.count_N.shape[0]
  num_heads = num_rows * splits // N
  head_blocks = max(1, num_heads // HEADS)
  stored = min(HEADS, num_heads)
  gathered = keys.row.ndim == 2
  pair = not gathered and head_blocks % 2 == 0
  value_tiles = V // mg.TILE
  tiles = value_tiles + 1
  # 512 threads are compiled for 128 registers each, and an instruction's sums must fit in those
  part = min(128, V // 2)
  part_tiles, parts = part // mg.TILE, V // part
  to_log2 = scale * math.log2(math.e)
  arrivals = mg.Arrivals(_BUFFERS * tiles, native and gathered)

  def kernel(
    q_g, q_rope_g, latent_g, rope_g, index_g, count_g, o_g, lse_g,
    q_s, latent_s, rope_s, rescale_s, row_s, loaded, ready, q_full, p_full, empty, done,
  ):  # fmt: skip
    group = lax.axis_index('warpgroup')
    if pair:
      pairs = jnp.int32(head_blocks // 2)
      query = lax.div(lax.axis_index('block'), pairs)
      head = (lax.rem(lax.axis_index('block'), pairs) * 2 + lax.axis_index('pair')) * HEADS
    else:
      query = lax.div(lax.axis_index('block'), jnp.int32(head_blocks))
      head = lax.rem(lax.axis_index('block'), jnp.int32(head_blocks)) * HEADS
    count = count_g[query]
    num_blocks = pl.cdiv(count, mg.BLOCK)
    slot_of = lambda i: lax.rem(i, jnp.int32(_BUFFERS))

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(168, action='increase')

      def block(i, accs):
        slot = slot_of(i)
        plgpu.barrier_wait(p_full.at[slot])
        a = plgpu.load(rescale_s.at[slot], layout=_ROW)
        accs = [scale_rows(acc, a, native=native) for acc in accs]
        mine = [group * (parts // 2) + n for n in range(parts // 2)]
        release = lambda n: plgpu.barrier_arrive(empty.at[slot * parts + mine[n]])
        values = [latent_s.at[slot, n] for n in mine]
        return accumulate(accs, rope_s.at[slot], values, release, native=native)

      zeros = plgpu.layout_cast(jnp.zeros((HEADS, part), jnp.float32), plgpu.Layout.WGMMA)
      accs = lax.fori_loop(0, num_blocks, block, [zeros] * (parts // 2))
      plgpu.barrier_wait(done)
      inverse = 1 / plgpu.load(row_s.at[0], layout=_ROW)
      # every score is made, so the queries' place is free
      half_tiles = value_tiles // 2
      mine = [group * half_tiles + c for c in range(half_tiles)]
      for c, tile in enumerate(mine):
        n, at = divmod(c * mg.TILE, part)
        o = accs[n][:, at : at + mg.TILE]
        q_s[tile] = (o * lax.broadcast_in_dim(inverse, o.shape, [0])).astype(q_s.dtype)
      plgpu.commit_smem()
      rows = pl.ds(pl.multiple_of(query * num_heads + head, 8), stored)
      for tile in mine:
        columns = pl.ds(pl.multiple_of(tile * mg.TILE, mg.TILE), mg.TILE)
        plgpu.copy_smem_to_gmem(q_s.at[tile, pl.ds(0, stored)], o_g.at[rows, columns])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(112, action='decrease')
      first = pl.multiple_of(lax.div(query, jnp.int32(splits)) * num_heads + head, 8)
      for c in range(value_tiles):
        columns = pl.ds(c * mg.TILE, mg.TILE)
        plgpu.copy_gmem_to_smem(q_g.at[pl.ds(first, HEADS), columns], q_s.at[c], q_full)
      plgpu.copy_gmem_to_smem(q_rope_g.at[pl.ds(first, HEADS)], q_s.at[value_tiles], q_full)
      plgpu.barrier_wait(ready)
      plgpu.barrier_wait(q_full)

      def block(i, carry):
        top, total = carry
        slot, round_ = slot_of(i), lax.div(i, jnp.int32(_BUFFERS))

        def scores(acc):
          for c in range(tiles):
            if gathered:
              arrivals.wait(loaded, slot * tiles + c, round_)
            elif c % part_tiles == 0:
              plgpu.barrier_wait(loaded.at[slot * (parts + 1) + c // part_tiles])
            n, at = divmod(c * mg.TILE, part)
            k = rope_s.at[slot] if c == value_tiles else latent_s.at[slot, n, :, pl.ds(at, mg.TILE)]
            plgpu.wgmma(acc, q_s.at[c], k.T)
          return acc[...]

        s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((HEADS, mg.BLOCK)))
        at = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
        s = jnp.where(at < count - i * mg.BLOCK, s * to_log2, _NO_SCORE)
        new_top = s.max(axis=1)
        new_top = jnp.where(new_top > top + _SLACK, new_top, top)
        a = jnp.exp2(top - new_top)
        p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
        rope_s[slot] = p.astype(rope_s.dtype)
        rescale_s[slot] = a
        plgpu.commit_smem()
        plgpu.barrier_arrive(p_full.at[slot])
        return new_top, total * a + p.sum(axis=1)

      full = lambda x: plgpu.layout_cast(jnp.full((HEADS,), x, jnp.float32), _ROW)
      top, total = lax.fori_loop(0, num_blocks, block, (full(_NO_SCORE), full(0.0)))
      total = jnp.maximum(total, 1e-30)
      row_s[0] = total
      row_s[1] = top + jnp.log(total) * math.log2(math.e)
      plgpu.commit_smem()
      plgpu.barrier_arrive(done)
      rows = pl.ds(pl.multiple_of(query * num_heads + head, 8), stored)
      plgpu.copy_smem_to_gmem(row_s.at[1, pl.ds(0, stored)], lse_g.at[rows])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 3)
    def _():
      plgpu.set_max_registers(56, action='decrease')
      arrivals.init(loaded)
      plgpu.barrier_arrive(ready)

      def free(i, n):
        @pl.when(i >= _BUFFERS)
        def _():
          plgpu.barrier_wait(empty.at[slot_of(i) * parts + n])

      def gather(i, held):
        slot = slot_of(i)
        # before the wait, which hides its latency
        following = mg.hold_rows(index_g, query, lax.min(i + 1, num_blocks - 1), native=native)
        for c in range(tiles):
          n, into = divmod(c, part_tiles)
          if into == 0 and n < parts:
            free(i, n)
          source, tile = (rope_g, 0) if c == value_tiles else (latent_g, c)
          target = rope_s.at[slot] if c == value_tiles else latent_s.at[slot, n]
          mg.gather_tile(
            source, held, index_g, target, loaded,
            tile=tile, into=into, barrier=slot * tiles + c, native=native,
          )  # fmt: skip
        return following

      def copy(i, _):
        slot = slot_of(i)
        rows = pl.ds(pl.multiple_of(index_g[query] + i * mg.BLOCK, 8), mg.BLOCK)
        shared: Any = {'collective_axes': 'pair'} if pair else {}
        barrier = lambda n: loaded.at[slot * (parts + 1) + n]
        for n in range(parts):
          free(i, n)
          columns = pl.ds(n * part, part)
          plgpu.copy_gmem_to_smem(
            latent_g.at[rows, columns], latent_s.at[slot, n], barrier(n), **shared
          )
        plgpu.copy_gmem_to_smem(rope_g.at[rows], rope_s.at[slot], barrier(parts), **shared)

      if gathered:
        held = mg.hold_rows(index_g, query, jnp.int32(0), native=native)
        lax.fori_loop(0, num_blocks, gather, held)
        mg.drain(native=native)
      else:
        lax.fori_loop(0, num_blocks, copy, None)

      # the last releases must have arrived before the block, and its barriers, may end
      def last(i, _):
        for n in range(parts):
          plgpu.barrier_wait(empty.at[slot_of(i) * parts + n])

      lax.fori_loop(lax.max(num_blocks - _BUFFERS, 0), num_blocks, last, None)

  tile = lambda *shape: plgpu.SMEM(shape, q_RV.dtype, transforms=mg.TRANSFORMS)
  empty = plgpu.Barrier(num_barriers=_BUFFERS * parts)
  if pair:
    empty = plgpu.ClusterBarrier(collective_axes=('pair',), num_barriers=_BUFFERS * parts)
  blocks = N * head_blocks
  cluster = {'cluster': (2,), 'cluster_names': ('pair',)} if pair else {}
  launch: Callable = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((N * num_heads, V), q_RV.dtype),
      jax.ShapeDtypeStruct((N * num_heads,), jnp.float32),
    ),
    scratch_types=(
      tile(tiles, HEADS, mg.TILE),
      tile(_BUFFERS, parts, mg.BLOCK, part),
      tile(_BUFFERS, mg.BLOCK, ROPE),
      plgpu.SMEM((_BUFFERS, HEADS), jnp.float32),
      plgpu.SMEM((2, HEADS), jnp.float32),
      arrivals.scratch() if gathered else plgpu.Barrier(num_barriers=_BUFFERS * (parts + 1)),
      plgpu.Barrier(),
      plgpu.Barrier(num_arrivals=tiles),
      plgpu.Barrier(num_barriers=_BUFFERS),
      empty,
      plgpu.Barrier(),
    ),
    grid=(blocks // 2 if pair else blocks,),
    grid_names=('block',),
    num_threads=4,
    thread_name='warpgroup',
    kernel_name='latent_attention_gathered' if gathered else 'latent_attention',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    **cluster,
  )
  return launch(q_RV, q_rope_RC, *keys)


def accumulate(accs, a, bs, release, *, native: bool):
  """acc + a @ b for each, all of them in flight at once; release(n) when the n-th b is read."""
  if not native:
    # the interpreter cannot go on with values as an accumulator
    accs = [acc + product(a, b, acc.shape) for acc, b in zip(accs, bs, strict=True)]
    for n in range(len(bs)):
      release(n)
    return accs

  def products(refs):
    for ref, b in zip(refs, bs, strict=True):
      plgpu.wgmma(ref, a, b)
    for n in range(len(bs)):
      plgpu.wgmma_wait(len(bs) - 1 - n)
      release(n)

  return pl.run_state(products)([plgpu.WGMMAAccumulatorRef.init(acc) for acc in accs])


def product(a, b, shape: tuple[int, int]) -> jax.Array:
  def multiply(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape))
