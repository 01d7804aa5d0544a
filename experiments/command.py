"""Command lines of small programs: the docstring is the help, and a mistake is one line."""

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Never

from moe_jax.config_io import nearest


class Parser(argparse.ArgumentParser):
  """Takes flags by their whole names, and ends the program with exit code 2 for a wrong one."""

  def __init__(self, module: str, doc: str | None):
    super().__init__(
      prog=f'python -m {module}',
      description=doc,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  def error(self, message: str) -> Never:
    end = '' if message.endswith(('.', '?')) else f'. See {self.prog} --help.'
    print(f'error: {message}{end}', file=sys.stderr)
    sys.exit(2)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
  """A type for `add_argument`: one of the names; for any other the nearest is suggested."""
  names = tuple(names)

  def check(given: str) -> str:
    if given not in names:
      raise argparse.ArgumentTypeError(f'{given!r} is not one of them. {nearest(given, names)}')
    return given

  return check
