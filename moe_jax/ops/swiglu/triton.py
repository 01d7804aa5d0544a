"""Triton kernels for SwiGLU: its gradient in one pass, and itself ending in FP8.

backward      program: some rows x 128 to 512 columns of gate and of up, all F in turn, so that the
              gradient in the weight is summed in registers. Reads da, gate, up once; writes the
              gradients of both and weight * a over them
              h may be rows in FP8
forward_rows  program: 16 rows x 128 columns, quantised as they are computed (quantize/triton.py);
              gate and up too where the backward pass is to have them in FP8

A gradient that ends in FP8, rows and columns of the three results in one kernel, was tried: it
holds too much in registers and takes twice as long as this gradient and the quantisers after it.
"""

# R rows  F width of gate and of up

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton
from moe_jax.ops.quantize.format import TILE, Format, Quantized
from moe_jax.ops.quantize.triton import grid_of, num_tiles, parts_of, place, rows_out, store_rows
from moe_jax.ops.swiglu import reference


def _swiglu_backward_kernel(da_ref, h_ref, w_ref, *refs, rows, width, limit):
  *scale_ref, dh_ref, a_ref, dw_ref = refs
  num_rows, f = da_ref.shape
  row = pl.program_id(0) * rows + jnp.arange(rows)
  weight = plt.load(w_ref.at[row], mask=row < num_rows, other=0.0)[:, None]

  def part(i, total):
    at, at_up = (grid_of(row, start + i * width + jnp.arange(width)) for start in (0, f))
    mask = (at[0] < num_rows) & (at[1] < f)
    load = lambda ref, at: plt.load(ref.at[at], mask=mask, other=0.0).astype(jnp.float32)

    def hidden(at):
      if not scale_ref:
        return load(h_ref, at)
      return load(h_ref, at) * load(scale_ref[0], (jax.lax.div(at[1], jnp.int32(TILE)), at[0]))

    dgate, dup, a, dweight = reference.gradients(
      load(da_ref, at), hidden(at), hidden(at_up), weight, limit=limit
    )
    plt.store(dh_ref.at[at], dgate.astype(dh_ref.dtype), mask=mask)
    plt.store(dh_ref.at[at_up], dup.astype(dh_ref.dtype), mask=mask)
    plt.store(a_ref.at[at], a.astype(a_ref.dtype), mask=mask)
    return total + dweight.sum(1)

  steps = pl.cdiv(f, width)
  zero = jnp.zeros(rows, jnp.float32)
  total = part(0, zero) if steps == 1 else jax.lax.fori_loop(0, steps, part, zero)
  plt.store(dw_ref.at[row], total, mask=row < num_rows)


def backward(
  da_RF: jax.Array,
  h_R2F: jax.Array | Quantized,
  weight_R: jax.Array,
  *,
  limit: float,
  elements: int = 2048,
  num_warps: int = 4,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  num_rows, f = da_RF.shape
  width = min(512, max(128, pl.next_power_of_2(f)))
  rows = max(1, elements // width)
  h, scale = (h_R2F.values, (h_R2F.scale,)) if isinstance(h_R2F, Quantized) else (h_R2F, ())
  return pallas_triton.call(
    functools.partial(_swiglu_backward_kernel, rows=rows, width=width, limit=limit),
    da_RF,
    h,
    weight_R,
    *scale,
    grid=(pl.cdiv(num_rows, rows),),
    out=(
      jax.ShapeDtypeStruct(h.shape, da_RF.dtype if scale else h.dtype),
      jax.ShapeDtypeStruct(da_RF.shape, da_RF.dtype),
      jax.ShapeDtypeStruct((num_rows,), jnp.float32),
    ),
    num_warps=num_warps,
    # each program reads what it then replaces
    aliases={0: 1} if scale else {0: 1, 1: 0},
  )


def _load(ref, row, col):
  at = grid_of(row, col)
  return plt.load(ref.at[at], mask=at[0] < ref.shape[0], other=0.0).astype(jnp.float32)


def _forward_rows_kernel(h_ref, *refs, rows, limit, fmt, keep):
  f = refs[0].shape[1]
  first_row, col = place(f, rows)
  gate, up = ([_load(h_ref, row, c) for row in parts_of(first_row, rows)] for c in (col, f + col))
  parts = [reference.swiglu(g, u, limit=limit) for g, u in zip(gate, up, strict=True)]
  store_rows(parts, refs[:2], first_row, col, fmt)
  if keep:
    store_rows(gate, refs[2:], first_row, col, fmt)
    store_rows(up, refs[2:], first_row, f + col, fmt)


def forward_rows(
  h_R2F: jax.Array,
  fmt: Format,
  *,
  limit: float,
  keep: bool = False,
  rows: int = 16,
  num_warps: int = 4,
) -> tuple[Quantized, ...]:
  """swiglu of h by rows; with `keep` also h itself by rows."""
  num_rows, f = h_R2F.shape[0], h_R2F.shape[1] // 2
  found = pallas_triton.call(
    functools.partial(_forward_rows_kernel, rows=rows, limit=limit, fmt=fmt, keep=keep),
    h_R2F,
    grid=(num_tiles(num_rows, f, rows),),
    out=[*rows_out(num_rows, f, fmt), *rows_out(num_rows, 2 * f, fmt) * keep],
    num_warps=num_warps,
  )
  return tuple(Quantized(*found[i : i + 2]) for i in range(0, len(found), 2))
