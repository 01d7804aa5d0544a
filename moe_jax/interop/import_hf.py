"""Converts a Hugging Face checkpoint: python -m moe_jax.interop.import_hf DIR OUT
[--dtype=float32|bfloat16]

Block by block: a model of any size converts in the memory of its largest matrix. Training starts
from OUT by --config.init_from=OUT; interop.load reads OUT and DIR alike.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from moe_jax.interop.checkpoint import Checkpoint
from moe_jax.interop.errors import InteropError
from moe_jax.interop.folders import ORIGIN, check_free, copy_companions, new_folder
from moe_jax.interop.native import write_native

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


def import_hf(folder: Path | str, out: Path | str, *, dtype: str | None = None) -> list[str]:
  """Writes OUT and returns lines that say what was left out.

  Args:
    dtype: of the weights in OUT; None keeps the checkpoint's own, and makes FP8 float32.

  Raises:
    InteropError: before anything is written, where DIR is not a whole, supported checkpoint.
  """
  folder, out = Path(folder), Path(out)
  source = Checkpoint(folder)
  check_free(out)
  with new_folder(out) as partial:
    write_native(source, partial, dtype=DTYPES[dtype] if dtype else None)
    shutil.copyfile(folder / 'config.json', partial / ORIGIN)
    copy_companions(folder, partial)
  return [f'left out: {count} tensors of {what}' for what, count in source.left_out.items()]


def run(function, doc: str | None, arguments: Sequence[tuple], argv: Sequence[str]) -> int:
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


def main(argv: Sequence[str] | None = None) -> int:
  arguments = [
    ('folder', dict(metavar='DIR', help='config.json and .safetensors files')),
    ('out', dict(metavar='OUT', help='a new folder')),
    ('--dtype', dict(choices=sorted(DTYPES), help="of the weights; default: the checkpoint's own")),
  ]
  return run(import_hf, __doc__, arguments, sys.argv[1:] if argv is None else argv)


if __name__ == '__main__':
  sys.exit(main())
