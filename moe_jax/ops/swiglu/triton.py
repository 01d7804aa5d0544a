"""Triton kernels for SwiGLU: its gradient in one pass, and itself ending in FP8.

backward      program: some rows x 128 to 512 columns of gate and of up, all F in turn, so that the
              gradient in the weight is summed in registers. Reads da, gate, up once; writes the
              gradients of both and weight * a over them
forward_rows  program: 32 rows x 128 columns, quantised as they are computed (quantize/triton.py)

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
from moe_jax.ops.quantize.format import Format, Quantized
from moe_jax.ops.quantize.triton import grid_of, num_tiles, parts_of, place, rows_out, store_rows
from moe_jax.ops.swiglu import reference


def _swiglu_backward_kernel(da_ref, h_ref, w_ref, dh_ref, a_ref, dw_ref, *, rows, width, limit):
  num_rows, f = da_ref.shape
  row = pl.program_id(0) * rows + jnp.arange(rows)
  weight = plt.load(w_ref.at[row], mask=row < num_rows, other=0.0)[:, None]

  def part(i, total):
    at, at_up = (grid_of(row, start + i * width + jnp.arange(width)) for start in (0, f))
    mask = (at[0] < num_rows) & (at[1] < f)
    load = lambda ref, at: plt.load(ref.at[at], mask=mask, other=0.0).astype(jnp.float32)
    dgate, dup, a, dweight = reference.gradients(
      load(da_ref, at), load(h_ref, at), load(h_ref, at_up), weight, limit=limit
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
  h_R2F: jax.Array,
  weight_R: jax.Array,
  *,
  limit: float,
  elements: int = 2048,
  num_warps: int = 4,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  num_rows, f = da_RF.shape
  width = min(512, max(128, pl.next_power_of_2(f)))
  rows = max(1, elements // width)
  return pallas_triton.call(
    functools.partial(_swiglu_backward_kernel, rows=rows, width=width, limit=limit),
    da_RF,
    h_R2F,
    weight_R,
    grid=(pl.cdiv(num_rows, rows),),
    out=(
      jax.ShapeDtypeStruct(h_R2F.shape, h_R2F.dtype),
      jax.ShapeDtypeStruct(da_RF.shape, da_RF.dtype),
      jax.ShapeDtypeStruct((num_rows,), jnp.float32),
    ),
    num_warps=num_warps,
    # each program reads what it then replaces
    aliases={0: 1, 1: 0},
  )


def _load(ref, row, col):
  at = grid_of(row, col)
  return plt.load(ref.at[at], mask=at[0] < ref.shape[0], other=0.0).astype(jnp.float32)


def _forward_rows_kernel(h_ref, values_ref, scale_ref, *, rows, limit, fmt):
  f = values_ref.shape[1]
  first_row, col = place(f, rows)
  parts = [
    reference.swiglu(_load(h_ref, row, col), _load(h_ref, row, f + col), limit=limit)
    for row in parts_of(first_row, rows)
  ]
  store_rows(parts, (values_ref, scale_ref), first_row, col, fmt)


def forward_rows(
  h_R2F: jax.Array, fmt: Format, *, limit: float, rows: int = 32, num_warps: int = 4
) -> Quantized:
  num_rows, f = h_R2F.shape[0], h_R2F.shape[1] // 2
  found = pallas_triton.call(
    functools.partial(_forward_rows_kernel, rows=rows, limit=limit, fmt=fmt),
    h_R2F,
    grid=(num_tiles(num_rows, f, rows),),
    out=rows_out(num_rows, f, fmt),
    num_warps=num_warps,
  )
  return Quantized(*found)
