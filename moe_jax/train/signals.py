"""Stopping on request: between two steps, and on every process at the same one."""

import logging
import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)


class StopSignal:
  """While entered, SIGTERM and the first SIGINT ask for a stop; a second SIGINT interrupts.

  One process keeps a flag of its own. Several must stop at the same step, or wait for each other
  for ever, so there SIGTERM is left to JAX's preemption service: a signal to any process makes all
  agree, in the background, on a step that none has passed yet. Asking costs 20 microseconds and
  touches no device; gathering flags with `process_allgather` would drain the devices' queues at
  every step. The service catches SIGTERM in a handler that one of ours would replace, so SIGINT is
  passed on to it as a SIGTERM.

  Enter it in the main thread, after `jax.distributed.initialize`.
  """

  def __init__(self):
    self._several = jax.process_count() > 1
    self._flag = False
    self._interrupted = False
    self._announced = False
    self._previous = {}

  def __enter__(self) -> 'StopSignal':
    for number in [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]:
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      # None stands for a handler that was not set from Python and cannot be set again from here
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def stop_requested(self, step: int) -> bool:
    """True on all processes at the same step; each calls it once for every step, in order."""
    stop = multihost_utils.reached_preemption_sync_point(step) if self._several else self._flag
    if stop and not self._announced:
      self._announced = True
      _log.warning('asked to stop: stopping after step %d', step)
    return stop

  def _handle(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
      if self._interrupted:
        raise KeyboardInterrupt
      self._interrupted = True
      if self._several:
        os.kill(os.getpid(), signal.SIGTERM)
    self._flag = True
