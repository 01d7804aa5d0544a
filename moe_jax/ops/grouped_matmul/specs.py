"""Named shapes, for tests, benchmarks and tuning alike."""

# R rows  D in  F out  E experts

import dataclasses
import itertools
import json
import math
import pathlib

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  name: str
  rows: int
  d: int
  f: int
  # rows of each expert; any left over belong to nobody
  sizes: tuple[int, ...]
  # first row of each expert; None if there are no gaps
  offsets: tuple[int, ...] | None = None

  @property
  def flops(self) -> int:
    """Of the forward pass, and as many again for each gradient."""
    return 2 * sum(self.sizes) * self.d * self.f

  def __str__(self) -> str:
    return self.name


def even(rows: int, experts: int) -> tuple[int, ...]:
  return tuple((e + 1) * rows // experts - e * rows // experts for e in range(experts))


def zipf(rows: int, experts: int, exponent: float = 1.0) -> tuple[int, ...]:
  """Expert of rank k gets a share of k**-exponent; ranks are scattered over the experts."""
  # a stride coprime to the count visits every expert once
  stride = next(s for s in range(experts // 3 + 1, experts + 2) if math.gcd(s, experts) == 1)
  share = [0.0] * experts
  for rank in range(experts):
    share[rank * stride % experts] = (rank + 1) ** -exponent
  total, edges, running = sum(share), [0], 0.0
  for one in share:
    running += one
    edges.append(round(rows * running / total))
  return tuple(b - a for a, b in itertools.pairwise(edges))


def recorded(rows: int, experts: int) -> tuple[int, ...]:
  """Shares as experts got them in a training run with balancing, see recorded_loads.json."""
  loads = json.loads(pathlib.Path(__file__).with_name('recorded_loads.json').read_text())
  running = np.cumsum([0, *itertools.chain(*loads['load_LE'])][: experts + 1])
  edges = np.rint(rows * running / running[-1]).astype(int)
  return tuple(int(n) for n in np.diff(edges))


# Small enough for the interpreter, and every one ugly in its own way. Rows are multiples of 8 and
# widths of 64, as the Hopper kernels need; ODD has the rest.
UGLY = (
  Spec(name='one_row', rows=8, d=64, f=64, sizes=(0, 1, 0)),
  Spec(name='one_expert', rows=72, d=64, f=64, sizes=(72,)),
  Spec(name='all_rows_to_one', rows=136, d=64, f=128, sizes=(0, 0, 136, 0)),
  Spec(name='no_rows_at_all', rows=64, d=64, f=64, sizes=(0, 0, 0)),
  Spec(name='not_a_multiple_of_the_tile', rows=200, d=128, f=64, sizes=(67, 1, 129, 3)),
  Spec(name='empty_first_and_last', rows=128, d=64, f=192, sizes=(0, 60, 0, 68, 0)),
  Spec(name='rows_past_the_end', rows=328, d=64, f=64, sizes=(5, 0, 91, 33)),
  Spec(
    name='gaps_between_groups',
    rows=320,
    d=64,
    f=64,
    sizes=(5, 0, 100, 60),
    offsets=(0, 64, 64, 192),
  ),
  Spec(name='gaps_anywhere', rows=256, d=64, f=64, sizes=(3, 0, 61, 40), offsets=(0, 61, 75, 203)),
)

ODD = (
  Spec(name='odd_everything', rows=101, d=7, f=13, sizes=(10, 0, 33, 1, 50)),
  Spec(name='fewer_rows_than_experts', rows=3, d=5, f=6, sizes=(0, 1, 0, 0, 1, 0, 1)),
  Spec(name='a_thousand_rows', rows=1000, d=16, f=24, sizes=zipf(1000, 8)),
)

# DeepSeek-V2-Lite's widths, a slice of DeepSeek-V3's, and the shape whose best public figure is
# tokamax's. Benchmarks replace the sizes by each of SIZES.
LARGE = (
  Spec(name='v2_lite', rows=65536, d=2048, f=1408, sizes=even(65536, 64)),
  Spec(name='v3_slice', rows=65536, d=7168, f=2048, sizes=even(65536, 32)),
  Spec(name='v3_narrow', rows=131072, d=7168, f=1024, sizes=even(131072, 256)),
)
# FP8, on groups that are multiples of 128 rows: DeepGEMM's two grouped forward passes, the linear
# of torchao's figures, and DeepGEMM's gradient in the weights
LARGE_FP8 = (
  Spec(name='fp8_deepgemm_up', rows=32768, d=7168, f=4096, sizes=even(32768, 8)),
  Spec(name='fp8_deepgemm_down', rows=32768, d=2048, f=7168, sizes=even(32768, 8)),
  Spec(name='fp8_linear', rows=32768, d=7168, f=2048, sizes=even(32768, 8)),
  Spec(name='fp8_deepgemm_wgrad', rows=32768, d=7168, f=4096, sizes=even(32768, 4)),
)
SIZES = {'recorded': recorded, 'even': even, 'zipf': zipf}
