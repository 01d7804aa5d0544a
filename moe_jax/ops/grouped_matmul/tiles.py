"""Which tile a Hopper kernel uses: measured choices in tiles.json, a rule for every other shape.

python -m experiments.bench.tune_grouped_matmul     # on the GPU; rewrites tiles.json
"""

# R rows  K contracted  N columns of the result  E experts

import dataclasses
import functools
import json
import pathlib

TABLE = pathlib.Path(__file__).with_name('tiles.json')
# what a Hopper block may have, less room for barriers and alignment
_SMEM_BYTES = 232_448 - 2_048
# both staging buffers of mosaic_rows.py, and of mosaic_weights.py
_STAGING_BYTES = 32_768


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
  """m x n of the result at a time, k contracted at a step, through a ring of stages."""

  m: int = 128
  n: int = 256
  k: int = 64
  stages: int = 4
  # rows of tiles that are worked through column by column
  strip: int = 8

  def fits(self, op: str) -> bool:
    ring = self.stages * (self.m + self.n) * self.k * 2
    return ring + _STAGING_BYTES <= _SMEM_BYTES


def candidates(op: str, n: int) -> list[Tile]:
  """Tile shapes for the autotuner to try, at one strip height."""
  shapes = [(128, 256, 4), (128, 256, 3), (128, 128, 6)]
  if op != 'wgrad':
    # wgrad has one slab of wgmma rows for each of its two warpgroups
    shapes.append((256, 128, 4))
  tiles = [Tile(m=m, n=tile_n, stages=stages) for m, tile_n, stages in shapes]
  return [tile for tile in tiles if tile.n <= max(n, 128) and tile.fits(op)]


def shape_key(op: str, num_rows: int, k: int, n: int, num_experts: int) -> str:
  return f'{op} R{num_rows} K{k} N{n} E{num_experts}'


@functools.cache
def _table() -> dict[str, dict[str, int]]:
  return json.loads(TABLE.read_text())['tiles'] if TABLE.exists() else {}


def choose(op: str, num_rows: int, k: int, n: int, num_experts: int) -> Tile:
  """The measured tile of this very shape, or the rule."""
  if measured := _table().get(shape_key(op, num_rows, k, n, num_experts)):
    return Tile(**measured)
  return rule(n)


def rule(n: int) -> Tile:
  """The widest tile is best at every shape measured; narrow results take narrow ones."""
  return Tile() if n > 128 else Tile(n=128, stages=6)
