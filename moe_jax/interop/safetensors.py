"""The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes.

Read and written here rather than by the `safetensors` package for two reasons: every complaint
names its file and tensor before anything is written, and every read or write is a slice by plain
file calls, so that memory holds the slice alone (a memory map would count the file's pages too).

Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.interop.errors import InteropError

DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the reference implementation


class Tensor(NamedTuple):
  """Where a tensor lies on the disk."""

  file: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int  # bytes from the start of the file

  def read(self, at: tuple[int, ...] = ()) -> np.ndarray:
    """The block at index `at` of the leading dims, of this tensor's dtype; () reads it all."""
    shape = self.shape[len(at) :]
    count = math.prod(shape) * self.dtype.itemsize
    block = int(np.ravel_multi_index(at, self.shape[: len(at)])) if at else 0
    data = np.fromfile(self.file, np.uint8, count, offset=self.offset + block * count)
    if data.size != count:
      raise InteropError(f'{self.file} became shorter while it was read. Copy it again.')
    return data.view(self.dtype).reshape(shape)


def read_header(file: Path) -> dict[str, Tensor]:
  """The tensors of one file by name; raises InteropError for a damaged or truncated file."""
  size = file.stat().st_size
  with open(file, 'rb') as f:
    start = f.read(8)
    length = int.from_bytes(start, 'little')
    if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
      raise InteropError(
        f'{file} is truncated or no safetensors file: {size} bytes do not hold its header. '
        'Copy it again.'
      )
    try:
      header = json.loads(f.read(length))
      header.pop('__metadata__', None)
      entries = {
        n: (e['dtype'], tuple(map(int, e['shape'])), *map(int, e['data_offsets']))
        for n, e in header.items()
      }
    except (ValueError, TypeError, KeyError, AttributeError):
      raise InteropError(f'{file} has a damaged header: it is not the JSON of safetensors. '
                         'Copy it again.') from None  # fmt: skip
  tensors = {}
  for name, (code, shape, begin, end) in entries.items():
    if code not in DTYPES:
      raise InteropError(
        f'{file}: tensor {name} has dtype {code}, which is none of {", ".join(DTYPES)}.'
      )
    if end - begin != math.prod(shape) * DTYPES[code].itemsize or begin < 0:
      raise InteropError(
        f'{file}: tensor {name} of {code}{list(shape)} should have '
        f'{math.prod(shape) * DTYPES[code].itemsize} bytes, its header says {end - begin}.'
      )
    if 8 + length + end > size:
      raise InteropError(
        f'{file} is truncated: tensor {name} ends at byte {8 + length + end}, the file at {size}. '
        'Copy it again.'
      )
    tensors[name] = Tensor(file, DTYPES[code], shape, 8 + length + begin)
  return tensors


def read_folder(folder: Path) -> dict[str, Tensor]:
  """All tensors of a checkpoint: of its index, of its single file, or of its .safetensors files."""
  if (folder / INDEX).is_file():
    return _read_index(folder)
  files = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob('*.safetensors'))
  if not files:
    raise InteropError(f'{folder} has no {INDEX}, no {SINGLE} and no other .safetensors file.')
  tensors: dict[str, Tensor] = {}
  for file in files:
    for name, tensor in read_header(file).items():
      if name in tensors:
        raise InteropError(f'{file}: tensor {name} is in {tensors[name].file.name} too.')
      tensors[name] = tensor
  return tensors


def _read_index(folder: Path) -> dict[str, Tensor]:
  try:
    where = json.loads((folder / INDEX).read_text())['weight_map']
    files = {name: folder / file for name, file in where.items()}
  except (ValueError, KeyError, TypeError, AttributeError):
    raise InteropError(
      f'{folder / INDEX} is damaged: it should be JSON with a weight_map.'
    ) from None
  headers = {}
  for file in sorted(set(files.values())):
    if not file.is_file():
      name = next(n for n, f in files.items() if f == file)
      raise InteropError(f'{file} is missing: {INDEX} says that it holds tensor {name}.')
    headers[file] = read_header(file)
  for name, file in files.items():
    if name not in headers[file]:
      raise InteropError(f'{file}: tensor {name} is missing, though {INDEX} says that it is there.')
  for file, header in headers.items():
    for name in header:
      if files.get(name) != file:
        raise InteropError(f'{file}: extra tensor {name}, which {INDEX} does not place there.')
  return {name: headers[file][name] for name, file in files.items()}


class Plan(NamedTuple):
  """A tensor to be written."""

  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class Writer:
  """Writes a checkpoint block by block, in files of at most `shard_bytes` (or one tensor).

  All names, shapes and dtypes are given first, so that every block has its place from the start.
  """

  def __init__(self, folder: Path, plans: Mapping[str, Plan], *, shard_bytes: int = 5 * 10**9):
    self._plans, self._at, self._files = dict(plans), {}, []
    shards: list[list[str]] = []
    room = 0
    for name, plan in plans.items():
      if not shards or plan.nbytes > room:
        shards.append([])
        room = shard_bytes
      shards[-1].append(name)
      room -= plan.nbytes
    names = [SINGLE]
    if len(shards) > 1:
      names = [f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
      self._start(folder / file, shard)
    if len(shards) > 1:
      index = {
        'metadata': {'total_size': sum(p.nbytes for p in plans.values())},
        'weight_map': {n: file for file, s in zip(names, shards, strict=True) for n in s},
      }
      (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *_: object) -> None:
    for file in self._files:
      os.fsync(file)
      os.close(file)

  def write(self, name: str, block: np.ndarray, *, at: tuple[int, ...] = ()) -> None:
    """Writes the block at index `at` of the leading dims, cast to the planned dtype."""
    plan, (file, offset) = self._plans[name], self._at[name]
    assert block.shape == plan.shape[len(at) :], (name, block.shape, plan.shape, at)
    data = np.ascontiguousarray(block, plan.dtype)
    number = int(np.ravel_multi_index(at, plan.shape[: len(at)])) if at else 0
    _write_all(file, data.reshape(-1).view(np.uint8), offset + number * data.nbytes)

  def _start(self, file: Path, names: list[str]) -> None:
    # widest dtype first, so that every tensor is aligned
    names = sorted(names, key=lambda n: -self._plans[n].dtype.itemsize)
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers asks for it
    end = 0
    for name in names:
      plan = self._plans[name]
      header[name] = {
        'dtype': CODES[plan.dtype],
        'shape': plan.shape,
        'data_offsets': (end, end + plan.nbytes),
      }
      end += plan.nbytes
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    self._files.append(handle)
    os.ftruncate(handle, 8 + len(text) + end)
    _write_all(handle, np.frombuffer(len(text).to_bytes(8, 'little') + text, np.uint8), 0)
    for name in names:
      self._at[name] = (handle, 8 + len(text) + header[name]['data_offsets'][0])


def _write_all(file: int, data: np.ndarray, offset: int) -> None:
  view = memoryview(data)
  while view:
    done = os.pwrite(file, view[: 1 << 30], offset)
    view, offset = view[done:], offset + done
