"""Numbers as people read them: 1.23M, 12.3k, 1m20s, 3.2 GiB."""

import math


def count(value: float) -> str:
  """1234567 -> '1.23M'; three significant digits, whole numbers below 1000 as they are."""
  if not math.isfinite(value):
    return str(value)
  scaled, suffix = float(value), ''
  for unit in ('', 'k', 'M', 'G', 'T', 'P', 'E'):
    suffix = unit
    # 999.5 would be printed as 1000 with three digits
    if abs(scaled) < 999.5:
      break
    if unit != 'E':
      scaled /= 1000
  digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
  text = f'{scaled:.{digits}f}'
  if not suffix and float(text) == int(float(text)):
    return str(int(float(text)))
  return text + suffix


def size(num_bytes: float) -> str:
  """3435973837 -> '3.2 GiB'."""
  scaled = float(num_bytes)
  for unit in ('B', 'KiB', 'MiB', 'GiB', 'TiB'):
    if abs(scaled) < 1023.95 or unit == 'TiB':
      return f'{scaled:.0f} B' if unit == 'B' else f'{scaled:.1f} {unit}'
    scaled /= 1024
  raise AssertionError('unreachable: the last unit takes everything')


def duration(seconds: float) -> str:
  """80 -> '1m20s'; the two largest units. Under ten seconds with one decimal."""
  if not math.isfinite(seconds):
    return '--'
  if seconds < 9.95:
    return f'{seconds:.1f}s'
  whole = round(seconds)
  if whole < 60:
    return f'{whole}s'
  if whole < 3600:
    return f'{whole // 60}m{whole % 60:02}s'
  if whole < 86_400:
    return f'{whole // 3600}h{whole % 3600 // 60:02}m'
  return f'{whole // 86_400}d{whole % 86_400 // 3600:02}h'
