"""How a config refuses a value: one line with the field, the value, the rule and the remedy."""

from typing import Any


def require(claim: bool, field: str, value: Any, rule: str, remedy: str) -> None:
  """Raises the one-line ValueError of this project: field, value, rule, remedy."""
  if not claim:
    raise ValueError(f'{field}={value!r} {rule}. {remedy}')


def positive(obj: Any, prefix: str, *names: str) -> None:
  for name in names:
    value = getattr(obj, name)
    require(value > 0, f'{prefix}.{name}', value, 'must be positive', 'Give a value above 0.')


def not_negative(obj: Any, prefix: str, *names: str) -> None:
  for name in names:
    value = getattr(obj, name)
    require(value >= 0, f'{prefix}.{name}', value, 'must not be negative', 'Give 0 or more.')


def one_of(obj: Any, prefix: str, name: str, choices: tuple[str, ...]) -> None:
  value = getattr(obj, name)
  require(
    value in choices,
    f'{prefix}.{name}',
    value,
    f'is not one of {", ".join(choices)}',
    'Choose one of these.',
  )
