"""Which backend runs: the one that was named, or Mosaic where it can."""

import functools
import logging

_log = logging.getLogger(__name__)
BACKENDS = ('mosaic', 'xla')


def choose(implementation: str | None, problem: str | None) -> str:
  """`problem`: why Mosaic cannot, in one line, or None."""
  if implementation not in (None, *BACKENDS):
    raise ValueError(f'implementation={implementation!r} must be None or in {list(BACKENDS)}.')
  if implementation == 'xla':
    return 'xla'
  if problem is None:
    return 'mosaic'
  if implementation == 'mosaic':
    raise NotImplementedError(f'grouped_matmul, mosaic: {problem}.')
  log_fallback(problem)
  return 'xla'


@functools.cache
def log_fallback(problem: str) -> None:
  _log.info('grouped_matmul: xla instead of mosaic, which %s.', problem)
