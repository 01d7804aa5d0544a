"""Which tile a Hopper kernel uses: measured choices in tiles.json, a rule for every other shape.

python -m experiments.bench.tune_grouped_matmul     # on the GPU; rewrites tiles.json
"""

# R rows  K contracted  N columns of the result  E experts

import functools
import json
import pathlib
from dataclasses import dataclass, replace

from moe_jax.ops.backends import SMEM_BYTES

TABLE = pathlib.Path(__file__).with_name('tiles.json')
# of shared memory, less room for barriers and alignment
_SMEM_BYTES = SMEM_BYTES - 2_048
# where results of both warpgroups leave: cut slabs in mosaic_rows.py, all of mosaic_weights.py
_EDGE_BYTES, _WEIGHTS_BYTES = 16_384, 65_536


@dataclass(frozen=True, kw_only=True)
class Tile:
  """m x n of the result at a time, k contracted at a step, through a ring of stages."""

  m: int = 128
  n: int = 256
  k: int = 64
  stages: int = 3
  # blocks in a cluster, which load their common operand once
  pair: int = 1
  # rows of tiles that are worked through column by column
  strip: int = 8

  def fits(self, op: str) -> bool:
    if op in FP8:
      own = replace(self, pair=1, strip=8) == replace(FP8[op], pair=1)
      return own and (self.pair == 1 or op == 'wgrad_fp8')
    ring = self.stages * (self.m + self.n) * self.k * 2
    staging = _WEIGHTS_BYTES if op == 'wgrad' else self.m * self.n * 2 + _EDGE_BYTES
    return ring + staging <= _SMEM_BYTES


# what the FP8 kernels are written for; strips may differ, and wgrad's blocks may be single
FP8 = {
  'forward_fp8': Tile(m=128, n=128, k=128, stages=4),
  'wgrad_fp8': Tile(m=128, n=256, k=128, stages=4, pair=2),
}


def candidates(op: str, n: int) -> list[Tile]:
  """Tile shapes for the autotuner to try, at one strip height."""
  if op in FP8:
    return [tile for pair in (1, 2) if (tile := replace(FP8[op], pair=pair)).fits(op)]
  shapes = [(128, 256, 3)] if n > 128 else [(128, 128, 5)]
  if op != 'wgrad':
    # wgrad has one slab of wgmma rows for each of its two warpgroups
    shapes.append((256, 128, 3))
  tiles = [Tile(m=m, n=n, stages=s, pair=pair) for m, n, s in shapes for pair in (1, 2)]
  return [tile for tile in tiles if tile.fits(op)]


def shape_key(op: str, num_rows: int, k: int, n: int, num_experts: int) -> str:
  return f'{op} R{num_rows} K{k} N{n} E{num_experts}'


@functools.cache
def _table() -> dict[str, dict]:
  return json.loads(TABLE.read_text())['tiles'] if TABLE.exists() else {}


def choose(op: str, num_rows: int, k: int, n: int, num_experts: int) -> Tile:
  """The measured tile of this very shape, or the rule."""
  if measured := _table().get(shape_key(op, num_rows, k, n, num_experts)):
    return Tile(**measured['tile'])
  return FP8[op] if op in FP8 else rule(n)


def rule(n: int) -> Tile:
  """128 x 256 is best at every shape measured; narrow results take narrow tiles."""
  return Tile() if n > 128 else Tile(n=128, stages=5)
