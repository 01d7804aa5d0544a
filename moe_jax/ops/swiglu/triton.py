"""Triton kernels for SwiGLU: its gradient in one pass, and both directions ending in FP8.

backward   program: some rows x 128 to 512 columns of gate and of up, all F in turn, so that the
           gradient in the weight is summed in registers. Reads da, gate, up once; writes the
           gradients of both and weight * a.
quantised  program: a tile of 128 columns, quantised as it is computed (ops/quantize/triton.py); the
           gradient in the weight leaves as one partial sum a tile.
"""

# R rows  F width of gate and of up

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.ops import pallas_triton
from moe_jax.ops.quantize.format import TILE, Format, Quantized
from moe_jax.ops.quantize.triton import (
  columns_out,
  grid_of,
  num_tiles,
  parts_of,
  place,
  rows_out,
  store_columns,
  store_rows,
  unpack,
)
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


def _backward_quantized_kernel(da_ref, h_ref, w_ref, *refs, limit, fmts):
  f = da_ref.shape[1]
  first_row, col = place(f)

  def compute(which):
    """The parts of one of the results. Each reads its operands anew, from the cache: all results
    of a tile at once do not fit into registers."""
    parts = []
    for row in parts_of(first_row):
      weight = plt.load(w_ref.at[row])[:, None]
      gate, up = _load(h_ref, row, col), _load(h_ref, row, f + col)
      found = reference.gradients(_load(da_ref, row, col), gate, up, weight, limit=limit)
      parts.append(found[which])
      if which == 2:
        step = jnp.full_like(row, 0) + jax.lax.div(col.min(), TILE)
        plt.store(refs[6].at[step, row], found[3].sum(1))
    return parts

  for which, at in ((0, col), (1, f + col)):
    parts = compute(which)
    store_rows(parts, refs[:2], first_row, at, fmts[0])
    store_columns(parts, refs[2:4], first_row, at, fmts[1])
  store_columns(compute(2), refs[4:6], first_row, col, fmts[2])


def backward_quantized(
  da_RF: jax.Array,
  h_R2F: jax.Array,
  weight_R: jax.Array,
  fmts: tuple[Format, Format, Format],
  *,
  limit: float,
  num_warps: int = 8,
) -> tuple[Quantized, Quantized, Quantized, jax.Array]:
  """Rows and columns of the gradient in h, columns of weight * a, the gradient in the weight."""
  num_rows, f = da_RF.shape
  (dh, dh_scale, dh_t, dh_t_scale, a_t, a_t_scale, dweight_CR) = pallas_triton.call(
    functools.partial(_backward_quantized_kernel, limit=limit, fmts=fmts),
    da_RF,
    h_R2F,
    weight_R,
    grid=(num_tiles(num_rows, f),),
    out=[
      *rows_out(num_rows, 2 * f, fmts[0]),
      *columns_out(num_rows, 2 * f),
      *columns_out(num_rows, f),
      jax.ShapeDtypeStruct((f // TILE, num_rows), jnp.float32),
    ],
    num_warps=num_warps,
  )
  dh_t, a_t = unpack(dh_t, dh_t_scale, fmts[1]), unpack(a_t, a_t_scale, fmts[2])
  return Quantized(dh, dh_scale), dh_t, a_t, dweight_CR.sum(0)
