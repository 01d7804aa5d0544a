"""Times tiles on every large shape; the best go to moe_jax/ops/grouped_matmul/tiles.json.

  python -m experiments.bench.tune_grouped_matmul [--only=v2_lite] [--out=tiles.json]

Group sizes are the recorded ones, for FP8 even multiples of 128. First the tile shapes, at one
strip height; then the heights, for the best shape. Needs a Hopper GPU.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import sys

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp

from experiments.bench import timing
from experiments.bench.suites import grouped_fp8
from experiments.bench.suites.grouped_matmul import data
from moe_jax.ops.grouped_matmul import layout, mosaic_gpu, tiles
from moe_jax.ops.grouped_matmul.specs import LARGE, LARGE_FP8, SIZES, Spec

STRIPS = (4, 8, 16)


def tune(spec: Spec) -> dict[str, tuple[tiles.Tile, float]]:
  """Best tile and its TFLOP/s for each op on one shape."""
  sizes = jnp.asarray(spec.sizes, jnp.int32)
  calls = _calls_fp8(spec, sizes) if spec in LARGE_FP8 else _calls(spec, sizes)
  best = {}
  for op, (fn, args, k, n) in calls.items():
    num_rows = jax.tree.leaves(args)[0].shape[1 if op == 'wgrad_fp8' else 0]
    rates = _rates(fn, args, tiles.candidates(op, n), spec.flops)
    winner = max(rates, key=rates.__getitem__)
    strips = [dataclasses.replace(winner, strip=s) for s in STRIPS if s != winner.strip]
    rates |= _rates(fn, args, strips, spec.flops)
    winner = max(rates, key=rates.__getitem__)
    best[tiles.shape_key(op, num_rows, k, n, len(spec.sizes))] = winner, rates[winner]
    for tile, rate in sorted(rates.items(), key=lambda item: -item[1]):
      print(f'{spec} {op:<8} {rate:6.0f} TFLOP/s  {tile}', flush=True)
  return best


def _calls(spec: Spec, sizes: jax.Array) -> dict[str, tuple]:
  """Function, arguments, contracted width and columns of each op."""
  x, w, dy, _ = jax.jit(data, static_argnums=0)(spec)
  groups = layout.compact_offsets(sizes), sizes
  dgrad = functools.partial(mosaic_gpu.forward, transpose_w=True)
  wgrad = functools.partial(mosaic_gpu.weight_grad, dtype=jnp.dtype('bfloat16'))
  return {
    'forward': (mosaic_gpu.forward, (x, w, *groups), spec.d, spec.f),
    'dgrad': (dgrad, (dy, w, *groups), spec.f, spec.d),
    'wgrad': (wgrad, (x, dy, *groups), spec.d, spec.f),
  }


def _calls_fp8(spec: Spec, sizes: jax.Array) -> dict[str, tuple]:
  made = jax.jit(grouped_fp8.data, static_argnums=0)(spec)
  groups = layout.padded_offsets(sizes, 128), sizes
  to = {'dtype': jnp.dtype('bfloat16')}
  forward = *made['x8'], *made['w8_t'], *groups
  columns = *made['x8_t'], *made['dy8_t'], *groups
  return {
    'forward_fp8': (functools.partial(mosaic_gpu.forward_fp8, **to), forward, spec.d, spec.f),
    'wgrad_fp8': (functools.partial(mosaic_gpu.weight_grad_fp8, **to), columns, spec.d, spec.f),
  }


def _rates(fn, args, candidates: list[tiles.Tile], flops: int) -> dict[tiles.Tile, float]:
  """TFLOP/s of each tile. Compiles side by side, since that takes far longer than the runs."""

  def compiled(tile: tiles.Tile):
    return jax.jit(functools.partial(fn, tile=tile)).lower(*args).compile()

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    ready = list(pool.map(compiled, candidates))
  return {
    tile: flops / timing.measure_jax(call, *args).median_s / 1e12
    for tile, call in zip(candidates, ready, strict=True)
  }


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m experiments.bench.tune_grouped_matmul')
  parser.add_argument('--only', default='', help='shapes whose name contains this text')
  parser.add_argument('--out', type=pathlib.Path, default=tiles.TABLE)
  args = parser.parse_args()
  if not mosaic_gpu.on_hopper():
    sys.exit(f'tuning needs a Hopper GPU, this is {jax.devices()[0].device_kind}')
  table = json.loads(tiles.TABLE.read_text())['tiles'] if tiles.TABLE.exists() else {}
  measured = {}
  for spec in LARGE:
    if args.only in spec.name:
      sizes = SIZES['recorded'](spec.rows, len(spec.sizes))
      measured |= tune(dataclasses.replace(spec, sizes=sizes))
  for spec in LARGE_FP8:
    if args.only in spec.name:
      measured |= tune(spec)
  measured_on = f'{jax.devices()[0].device_kind}, {datetime.date.today()}, jax {jax.__version__}'
  table |= {
    key: {'tile': dataclasses.asdict(tile), 'tflops': round(rate), 'measured': measured_on}
    for key, (tile, rate) in measured.items()
  }
  content = {
    'command': 'python -m experiments.bench.tune_grouped_matmul',
    'tiles': table,
  }
  args.out.write_text(json.dumps(content, indent=1) + '\n')


if __name__ == '__main__':
  main()
