"""The one-line error of this project, for places that find out by an exception."""

from typing import Any


def refusal(field: str, value: Any, rule: str, remedy: str) -> ValueError:
  """The error that `moe_jax.config.require` raises: field, value, rule, remedy."""
  return ValueError(f'{field}={value!r} {rule}. {remedy}')


def one_line(error: BaseException) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split())
