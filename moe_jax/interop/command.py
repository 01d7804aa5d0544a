"""The command lines of import_hf and export_hf: arguments, one line of error, an exit code."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from moe_jax.interop.errors import InteropError

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


def run(
  function: Callable[..., Sequence[str]],
  doc: str | None,
  arguments: Sequence[tuple[str, dict[str, Any]]],
  argv: Sequence[str] | None,
) -> int:
  """Parses a command line, calls the function on the CPU, prints its lines or its one error."""
  jax.config.update('jax_platforms', 'cpu')
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, options in arguments:
    parser.add_argument(name, **options)
  try:
    for line in function(**vars(parser.parse_args(argv))):
      print(line)
  except InteropError as e:
    print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
    return 2
  except OSError as e:
    where = f' ({e.filename})' if e.filename else ''
    print(f'error: cannot read or write{where}: {e.strerror or e}.', file=sys.stderr)
    return 2
  return 0
