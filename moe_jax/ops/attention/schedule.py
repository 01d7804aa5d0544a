"""Which tiles of attention each block of a kernel takes, one after another."""

# a tile of T, the t-th of its head, meets t + 1 blocks of keys

import functools
import heapq

import numpy as np

# of a tile that has nothing to multiply, in blocks of keys
_OVERHEAD = 1.0
# of the work that is left, in the lists of a wave; the rest evens out what these turn out to take
_SHARE = 0.6
# lists shorter than this are of one tile
_LEAST_TILES = 2.0
# heads at the end whose tiles go by length, across heads; what comes before goes head by head, as
# few heads' keys fit into L2
_MIXED_HEADS = 8


@functools.lru_cache(maxsize=64)
def lists_of_tiles(num_heads: int, num_tiles: int, num_cores: int) -> np.ndarray:
  """[lists, most + 1] int32 head * num_tiles + tile, -1 behind the last of each list.

  Lists come in waves, one for each core and then shorter ones, down to single tiles, so that cores
  which are done early take more of them: documents and windows make tiles shorter than they seem
  here, where all is causal. Long tiles go first, each to the list that has the least so far.

  Args:
    num_heads: of all rows of the batch.
  """
  apart = max(0, num_heads - _MIXED_HEADS)
  order = [(head, tile) for head in range(apart) for tile in reversed(range(num_tiles))]
  order += [(head, tile) for tile in reversed(range(num_tiles)) for head in range(apart, num_heads)]
  left = sum(tile + 1 + _OVERHEAD for _, tile in order)
  lists: list[list[int]] = []
  at = 0
  while at < len(order):
    if (len(order) - at) * _SHARE < _LEAST_TILES * num_cores:
      lists += [[head * num_tiles + tile] for head, tile in order[at:]]
      break
    wave: list[list[int]] = [[] for _ in range(num_cores)]
    free, goal = [(0.0, n) for n in range(num_cores)], left * (1 - _SHARE)
    while left > goal:
      (head, tile), (work, n) = order[at], free[0]
      cost = tile + 1 + _OVERHEAD
      wave[n].append(head * num_tiles + tile)
      heapq.heapreplace(free, (work + cost, n))
      left, at = left - cost, at + 1
    lists += wave
  most = max(map(len, lists))
  return np.array([items + [-1] * (most + 1 - len(items)) for items in lists], np.int32)
