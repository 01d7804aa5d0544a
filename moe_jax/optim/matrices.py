"""Which parameters are matrices, and how many: what an optimizer of whole matrices works on.

A parameter's name ends in its dimensions (`q_up_QHX`: Q, H, X). Here they are sorted into three:
those that count matrices (layers, experts, gate and up), those that make rows, and those that make
columns. What a published checkpoint stores as one matrix is one matrix here, heads joined:

  gate_DF  down_FD  router_DE  kv_down_DX  q_down_DQ   as named: the first dimension by the second
  q_DHC k_DHC v_DHC                                    [D, H*C]; all heads are one matrix
  q_up_QHX                                             [Q, H*X]
  q_up_QHC, q_QHC, query_QJI                           likewise, of V4 and of indexers
  key_up_RHN, value_up_RHV                             [R, H*N] and [R, H*V]: W^UK and W^UV of the
                                                       paper, though files store both in kv_b_proj
  out_HCD, out_HVD, out_GMVD                           [H*C, D], heads of all groups joined
  out_down_GXR                                         G of [X, R]: groups of heads share nothing
  out_up_GRD                                           [G*R, D]
  fn_JDX                                               [J*D, X], of V4's hyper-connections
  gate_up_ED2F                                         2 E of [D, F]: each expert's gate, and its up
  down_EFD                                             E of [F, D]

Dimensions before the named ones (the repeats of a scanned group) count matrices too.
"""

from typing import NamedTuple


class Layout(NamedTuple):
  """Dimensions of an array, by index: [counting matrices], [rows], [columns]."""

  batch: tuple[int, ...]
  rows: tuple[int, ...]
  columns: tuple[int, ...]

  @property
  def order(self) -> tuple[int, ...]:
    """The permutation that brings an array into matrix order."""
    return self.batch + self.rows + self.columns


# by the letters of the name's end: those that count, those of rows, those of columns
_LAYOUTS = {
  'DHC': ('', 'D', 'HC'),
  'QHX': ('', 'Q', 'HX'),
  'QHC': ('', 'Q', 'HC'),
  'QJI': ('', 'Q', 'JI'),
  'GMVD': ('', 'GMV', 'D'),
  'GXR': ('G', 'X', 'R'),
  'GRD': ('', 'GR', 'D'),
  'JDX': ('', 'JD', 'X'),
  'RHN': ('', 'R', 'HN'),
  'RHV': ('', 'R', 'HV'),
  'HCD': ('', 'HC', 'D'),
  'HVD': ('', 'HV', 'D'),
  'ED2F': ('E2', 'D', 'F'),
  'EFD': ('E', 'F', 'D'),
}

# matrices by shape alone: tables of a row for each token id, and the compressors' additive bias
_NO_MATRICES = ('embedding_VD', 'head_DV', 'bias_MX')


def layout(name: str, ndim: int) -> Layout | None:
  """How the parameter `name` splits into matrices; None where it does not hold any.

  None: the embedding, the output head, the compressors' position bias, and what is one-dimensional
  within a layer (norms, biases, sinks).

  Raises:
    ValueError: a name of three dimensions or more that the table above does not list.
  """
  letters = name.rsplit('_', 1)[-1]
  assert ndim >= len(letters), f'{name} has {ndim} dimensions'
  if name in _NO_MATRICES or len(letters) == 1:
    return None
  if len(letters) == 2:
    batch, rows, columns = '', letters[0], letters[1]
  elif letters in _LAYOUTS:
    batch, rows, columns = _LAYOUTS[letters]
  else:
    raise ValueError(
      f"optim.name='muon' does not know which matrices the parameter {name!r} holds. "
      'Add its dimensions to _LAYOUTS in moe_jax/optim/matrices.py.'
    )
  lead = ndim - len(letters)

  def index(chosen: str) -> tuple[int, ...]:
    return tuple(lead + letters.index(c) for c in chosen)

  return Layout((*range(lead), *index(batch)), index(rows), index(columns))
