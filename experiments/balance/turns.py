"""Processes that share a device and must not slow each other down."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
  """Waits until no other process holds `lock`, and holds it."""
  if lock is None:
    yield
    return
  with lock.open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
