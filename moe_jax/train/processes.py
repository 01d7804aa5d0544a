"""What the processes of one run must agree on outside a step; with one process, nothing at all.

Both functions are collectives over all devices: every process calls them at the same place of its
main thread. A call from a background thread would race with the training step and leave the
processes waiting for one another.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

_LINE_BYTES = 2048


def raise_together(error: Exception | None, kind: type[Exception]) -> None:
  """Raises on all processes when any of them brings an error, so that none is left waiting.

  The process that failed raises its own error, the others a `kind` with the same text.
  """
  text = str(error) if error else ''
  if jax.process_count() > 1:
    line = np.zeros(_LINE_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_LINE_BYTES], np.uint8)
    line[: len(data)] = data
    lines = [bytes(row).rstrip(b'\0') for row in multihost_utils.process_allgather(line)]
    text = next((row.decode(errors='replace') for row in lines if row), '')
  if error is not None:
    raise error
  if text:
    raise kind(text)


def from_first(number: int) -> int:
  """Returns process 0's number on every process; it must fit in 32 bits."""
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
