"""Which backend of an op runs: the one that was named, or the fastest that can."""

import functools
import logging

import jax

_log = logging.getLogger(__name__)

# of shared memory, what a Hopper block may have
SMEM_BYTES = 232_448


def choose(
  op: str,
  implementation: str | None,
  problem: str | None,
  *,
  fast: str = 'mosaic',
  fallback: str = 'xla',
) -> str:
  """`fast` or `fallback`; a fallback that nobody named is logged once.

  Args:
    problem: why `fast` cannot run, in one line, or None.

  Raises:
    NotImplementedError: `fast` was named and cannot run.
    ValueError: an unknown implementation.
  """
  return first(op, implementation, {fast: problem}, fallback=fallback)


def first(
  op: str,
  implementation: str | None,
  problems: dict[str, str | None],
  *,
  fallback: str = 'xla',
) -> str:
  """`choose` among several: the first whose problem is None, or `fallback` after all of them.

  Args:
    problems: of each backend, the fastest first.
  """
  if implementation is not None:
    if implementation not in (*problems, fallback):
      raise ValueError(
        f'{op}: implementation={implementation!r} must be None or in {[*problems, fallback]}.'
      )
    if problem := problems.get(implementation):
      raise NotImplementedError(f'{op}, {implementation}: {problem}.')
    return implementation
  found = next((name for name, problem in problems.items() if problem is None), fallback)
  for name, problem in problems.items():
    if problem is None:
      break
    log_fallback(op, name, found, problem)
  return found


@functools.cache
def log_fallback(op: str, fast: str, fallback: str, problem: str) -> None:
  _log.info('%s: %s instead of %s, which %s.', op, fallback, fast, problem)


def on_hopper() -> bool:
  device = jax.devices()[0]
  return device.platform == 'gpu' and device.compute_capability == '9.0'


def num_sms() -> int:
  """Streaming multiprocessors of the device compiled for."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.num_cores:
    return device.num_cores
  # without a GPU this is the interpreter, where more blocks only take longer
  return jax.devices()[0].core_count if jax.default_backend() == 'gpu' else 1
