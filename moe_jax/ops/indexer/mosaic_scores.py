"""Hopper kernel: index scores of a block of queries, sum_j w_j relu(q_j . k).

  block        256 rows (queries by index heads) of q, which stay in shared memory, times all keys
               they may see, 128 at a time; two warpgroups multiply 64 keys each, a third loads
  product      keys are the rows of the product and heads its columns, so the sum over heads is
               within a row: 64 of its 128 columns lie in four neighbouring threads
  epilogue     relu, times w, summed; while one warpgroup does that the other one multiplies

Traffic: keys from L2, 32 kB a block of 128 for 2 x 256 x 128 x 128 operations; scores to device
memory, 4 bytes for 2 J I operations. Bound: the tensor cores, then the epilogue's instructions:
3 for every product against 2 I / 4096 cycles, which float8 halves.
"""

# T queries  J index heads  I index width  S keys  R rows (T*J)  G groups of queries

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.attention.mosaic_common import compiler_params
from moe_jax.ops.grouped_matmul.mosaic_common import fill_ring, ring_slot, smem_layout
from moe_jax.ops.grouped_matmul.mosaic_gpu import on_hopper

KEYS = 128
_ROWS = 256
_COLUMNS = 128
_SLAB = 64
_STAGES = 3


def unsupported(dtype: jnp.dtype, num_keys: int, num_heads: int, width: int) -> str | None:
  """Why this kernel cannot run here, in one line, or None if it can."""
  if not on_hopper():
    return f'needs a Hopper GPU (compute capability 9.0), this is {jax.devices()[0].device_kind}'
  if dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
    return f'needs bfloat16 or float8_e4m3fn, got {dtype}'
  if num_heads not in (8, 16, 32, 64, 128):
    return f'needs 8, 16, 32, 64 or 128 index heads, got {num_heads}'
  if width not in (64, 128) or (width, dtype) == (64, jnp.float8_e4m3fn):
    return f'needs index width 128 (or 64 in bfloat16), got {width}'
  if num_keys % 8:
    return f'needs a multiple of 8 keys, got {num_keys}'
  return None


def scores(
  q_TJI: jax.Array,
  k_SI: jax.Array,
  weight_TJ: jax.Array,
  key_scale_S: jax.Array | None,
  first_T: jax.Array,
  end_T: jax.Array,
) -> jax.Array:
  """[T, S] float32; what lies outside of first_T to end_T is undefined.

  Args:
    weight_TJ: float32, with every factor of its query in it. key_scale_S: a factor for each key.
  """
  (T, J, I), S = q_TJI.shape, k_SI.shape[0]
  queries = _ROWS // J
  groups = pl.cdiv(T, queries)
  pad = groups * queries - T
  grouped = lambda a, fill: jnp.pad(a, (0, pad), constant_values=fill).reshape(groups, queries)
  first_G = grouped(first_T, S).min(1) // KEYS
  range_G2 = jnp.stack([first_G, pl.cdiv(grouped(end_T, 0).max(1), KEYS)], 1).astype(jnp.int32)
  scaled = key_scale_S is not None
  weight_R = jnp.pad(weight_TJ.astype(jnp.float32), ((0, pad), (0, 0))).reshape(-1)

  def kernel(q_g, k_g, w_g, range_g, scale_g, out_g, q_s, k_s, w_s, scale_s, out_s, *barriers):
    q_full, full, empty = barriers
    group = lax.axis_index('warpgroup')
    # the longest rows first, so that the last blocks to start are short
    block = groups - 1 - lax.axis_index('block')
    start, end = range_g[block, 0], range_g[block, 1]
    steps = lax.max(end - start, 0)

    @pl.when(group < 2)
    def _():
      plgpu.set_max_registers(232, action='increase')
      plgpu.barrier_wait(q_full)
      column = plgpu.Layout.WGMMA.reduce(0)
      halves = range(0, _ROWS, _COLUMNS)
      weights = [plgpu.load(w_s.at[pl.ds(h, _COLUMNS)], layout=column) for h in halves]
      mine = pl.ds(pl.multiple_of(group * _SLAB, _SLAB), _SLAB)

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
            w = lax.broadcast_in_dim(weights[n], dot.shape, [1])
            part = jnp.maximum(dot, 0.0) * w
            for m in range(_COLUMNS // J):
              value = part[:, m * J : (m + 1) * J].sum(axis=1)
              if scaled:
                row = plgpu.Layout.WGMMA.reduce(1)
                value *= plgpu.load(scale_s.at[slot, mine], layout=row)
              out_s[group, n * (_COLUMNS // J) + m] = value

        pl.run_scoped(products, [plgpu.WGMMAAccumulatorRef((_SLAB, _COLUMNS)) for _ in halves])
        plgpu.barrier_arrive(empty.at[slot])
        plgpu.commit_smem()
        at = (
          pl.ds(block * queries, queries),
          pl.ds(pl.multiple_of((start + i) * KEYS + group * _SLAB, _SLAB), _SLAB),
        )
        # past the last query or key, TMA drops what it is given
        plgpu.copy_smem_to_gmem(out_s.at[group], out_g.at[at])

      lax.fori_loop(0, steps, step, None)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(40, action='decrease')
      rows = pl.ds(block * _ROWS, _ROWS)
      plgpu.copy_gmem_to_smem(q_g.at[rows], q_s, q_full)
      plgpu.copy_gmem_to_smem(w_g.at[rows], w_s, q_full)

      def load(i, slot):
        keys = pl.ds(pl.multiple_of((start + i) * KEYS, KEYS), KEYS)
        plgpu.copy_gmem_to_smem(k_g.at[keys], k_s.at[slot], full.at[slot])
        if scaled:
          plgpu.copy_gmem_to_smem(scale_g.at[keys], scale_s.at[slot], full.at[slot])

      fill_ring(steps, _STAGES, empty, load)

  itemsize = q_TJI.dtype.itemsize
  transforms = smem_layout(128 // itemsize, itemsize)
  launch: Callable = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((T, S), jnp.float32),
    scratch_types=(
      plgpu.SMEM((_ROWS, I), q_TJI.dtype, transforms=transforms),
      plgpu.SMEM((_STAGES, KEYS, I), k_SI.dtype, transforms=transforms),
      plgpu.SMEM((_ROWS,), jnp.float32),
      plgpu.SMEM((_STAGES, KEYS), jnp.float32),
      plgpu.SMEM((2, queries, _SLAB), jnp.float32),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2 if scaled else 1, num_barriers=_STAGES),
      plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
    ),
    grid=(groups,),
    grid_names=('block',),
    num_threads=3,
    thread_name='warpgroup',
    kernel_name='index_scores',
    # no barriers around each store of sums: those of commit_smem and of the wait before are enough
    compiler_params=compiler_params(),
  )
  scale_S = key_scale_S if scaled else jnp.zeros((8,), jnp.float32)
  return launch(q_TJI.reshape(T * J, I), k_SI, weight_R, range_G2, scale_S)
