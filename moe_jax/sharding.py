"""Mesh axes and every named PartitionSpec of the project, on one page.

Axes: `data` splits the batch, and parameters FSDP-style; `expert` splits experts, and the batch
too; `model` splits heads, widths and the vocabulary. Any axis may be 1: one device is the mesh
(1, 1, 1), not a special case. All axes are explicit: an array's type says how it is split, and an
ambiguous operation is an error rather than a guess.
"""

import math

import jax
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

# B batch  S sequence  D model  J residual streams  G groups of heads  H heads  C head dim  F width
# E experts  V vocabulary
DATA, EXPERT, MODEL = 'data', 'expert', 'model'
AXES = (DATA, EXPERT, MODEL)
# sequences are shared by the data and the expert axis
BATCH = (DATA, EXPERT)

# activations: (B,), (B, S), (B, S, D), (B, S, J, D), (B, S, H, C), (B, H, S), (B, S, F), (B, S, V)
BY_ROW = P(BATCH)
TOKENS = P(BATCH, None)
STREAM = P(BATCH, None, None)
STREAMS = P(BATCH, None, None, None)
HEADS = P(BATCH, None, MODEL, None)
HEAD_ROWS = P(BATCH, MODEL, None)
WIDE = P(BATCH, None, MODEL)

# parameters as stored: `data` holds an FSDP share of each, `model` splits the width
VECTOR = P(None)
EMBEDDING_VD = P(MODEL, DATA)
HEAD_DV = P(DATA, MODEL)
MATRIX_DX = P(DATA, None)
MATRIX_DF = P(DATA, MODEL)
MATRIX_FD = P(MODEL, DATA)
HEADS_DHC = P(DATA, MODEL, None)
HEADS_HCD = P(MODEL, None, DATA)
PER_HEAD = P(MODEL)
GROUPS_GXR = P(MODEL, DATA, None)
GROUPS_GRD = P(MODEL, None, DATA)
STREAMS_JDX = P(None, DATA, None)
# query heads by the key-value head that a group of them shares
GROUPS_DGMC = P(DATA, MODEL, None, None)
GROUPS_GMCD = P(MODEL, None, None, DATA)
EXPERTS_ED2F = P(EXPERT, DATA, None, MODEL)
EXPERTS_EFD = P(EXPERT, MODEL, DATA)


def gathered(spec: P) -> P:
  """The spec a parameter is used with: its FSDP share over `data` gathered, the rest as stored."""
  return P(*(None if axis == DATA else axis for axis in spec))


def make_mesh(shape: tuple[int, int, int]) -> Mesh:
  """A mesh of explicit axes (data, expert, model) over the first devices, as many as it takes."""
  devices = jax.devices()[: math.prod(shape)]
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, BY_ROW)
