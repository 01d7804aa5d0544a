"""Cutting long text at its own borders."""

import re

PARAGRAPH = re.compile(r'\n[ \t\r]*\n+(?=\S)')
LINE = re.compile(r'\n(?=[ \t]*\S)')


def pieces(text: str, limit: int) -> list[str]:
  """Cuts `text` into parts of at most `limit` characters that join to it again.

  A cut falls behind the last empty line that lies in the second half of the window, else behind the
  last line break, else at the limit. White space other than an indent stays with what is before it.
  """
  assert limit > 0
  parts, start = [], 0
  while len(text) - start > limit:
    end = start + limit
    cut = _last(PARAGRAPH, text, start + limit // 2, end) or _last(LINE, text, start, end) or end
    parts.append(text[start:cut])
    start = cut
  return [*parts, text[start:]]


def _last(border: re.Pattern[str], text: str, start: int, end: int) -> int | None:
  # `endpos` hides the character that the look-ahead needs, so it lies one past the window.
  return max((m.end() for m in border.finditer(text, start, end + 1)), default=None)
