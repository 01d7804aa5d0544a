"""The one error of reading and writing other people's checkpoints."""


class InteropError(ValueError):
  """One line: the file, the tensor or field, what was expected, and what is there."""
