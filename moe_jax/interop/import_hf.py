"""Converts a Hugging Face checkpoint: python -m moe_jax.interop.import_hf DIR OUT
[--dtype=float32|bfloat16]

Block by block: a model of any size converts in the memory of its largest matrix. Training starts
from OUT by --config.init_from=OUT; interop.load reads OUT and DIR alike.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_jax.interop.checkpoint import Checkpoint
from moe_jax.interop.command import DTYPES, run
from moe_jax.interop.folders import ORIGIN, check_free, copy_companions, new_folder
from moe_jax.interop.native import write_native


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


def main(argv: Sequence[str] | None = None) -> int:
  arguments = [
    ('folder', dict(metavar='DIR', help='config.json and .safetensors files')),
    ('out', dict(metavar='OUT', help='a new folder')),
    ('--dtype', dict(choices=sorted(DTYPES), help="of the weights; default: the checkpoint's own")),
  ]
  return run(import_hf, __doc__, arguments, argv)


if __name__ == '__main__':
  sys.exit(main())
