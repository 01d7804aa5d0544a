"""Writes a model in the published layout: python -m moe_jax.interop.export_hf FROM DIR
[--packed] [--dtype=float32|bfloat16]

FROM is a workdir, whose newest whole checkpoint is taken, or a folder that import_hf made. DIR gets
config.json and .safetensors files of at most 5 GB with an index, for transformers, vLLM or SGLang.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_jax.interop.command import DTYPES, run
from moe_jax.interop.errors import InteropError
from moe_jax.interop.folders import ORIGIN, check_free, copy_companions, new_folder
from moe_jax.interop.native import Native, is_native
from moe_jax.interop.published import Export
from moe_jax.interop.trained import Trained


def export_hf(
  source: Path | str, folder: Path | str, *, packed: bool = False, dtype: str | None = None
) -> list[str]:
  """Writes DIR, whole or not at all.

  Args:
    packed: the experts of a layer in one tensor instead of one each.
    dtype: of the weights; None keeps their own.

  Raises:
    InteropError: before anything is written, where FROM is neither, or no published generation
      can express it.
  """
  source, folder = Path(source), Path(folder)
  if is_native(source):
    origin = source / ORIGIN
    kept = json.loads(origin.read_text()) if origin.is_file() else None
    model = Native(source)
  elif (source / 'checkpoints').is_dir():
    kept, model = None, Trained(source)
  else:
    raise InteropError(
      f'{source} is neither a workdir with checkpoints nor a folder that import_hf made.'
    )
  export = Export(model, packed=packed, dtype=DTYPES[dtype] if dtype else None, origin=kept)
  check_free(folder)
  with new_folder(folder) as partial:
    export.write(partial)
    copy_companions(source, partial)
  return []


def main(argv: Sequence[str] | None = None) -> int:
  arguments = [
    ('source', dict(metavar='FROM', help='a workdir, or a folder that import_hf made')),
    ('folder', dict(metavar='DIR', help='a new folder')),
    ('--packed', dict(action='store_true', help='experts of a layer in one tensor')),
    ('--dtype', dict(choices=sorted(DTYPES), help='of the weights; default: their own')),
  ]
  return run(export_hf, __doc__, arguments, argv)


if __name__ == '__main__':
  sys.exit(main())
