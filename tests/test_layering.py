"""Who may import whom. A new arrow is added here, on purpose, or not at all."""

import ast
import functools
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
STANDARD = sys.stdlib_module_names

# Layers from the lowest; a part imports from its own layer where `MAY` says so, and from those
# below. Names are the modules and folders of moe_jax.
LOW = {'config', 'config_io'}
MAY = {
  'config': set(),
  'config_io': {'config'},
  'sharding': set(),
  'precision': {*LOW, 'ops'},
  'ops': {'sharding'},
  'routing': {*LOW, 'ops'},
  'optim': LOW,
  'data': LOW,
  'models': {*LOW, 'sharding', 'precision', 'ops', 'routing'},
  'train': {*LOW, 'sharding', 'precision', 'ops', 'routing', 'optim', 'data', 'models'},
  'infer': {*LOW, 'sharding', 'precision', 'ops', 'models'},
  'interop': {*LOW, 'sharding', 'precision', 'ops', 'routing', 'models', 'train'},
  'analysis': {*LOW, 'train'},
}
# What comes from outside, where a folder is kept to a list; the standard library is always free.
OUTSIDE = {
  'config': set(),
  'config_io': set(),
  'sharding': {'jax'},
  # jaxlib's MLIR is what Mosaic's inlined code is made of
  'ops': {'jax', 'jaxlib', 'numpy', 'jaxtyping', 'einops'},
  'routing': {'jax', 'numpy', 'jaxtyping', 'einops'},
}
# Programs, from the highest; each knows all that is below it.
TOP = ('sweeps', 'experiments')
# One folder each: its replacement is then the work of one folder.
ONLY = {
  'flax': {'models'},
  'optax': {'optim', 'train'},
  'orbax': {'train'},
  'grain': {'data'},
  'tokenizers': {'data', 'interop'},
  'matplotlib': {'analysis'},
  'ml_collections': {'experiments'},
  'absl': {'experiments', 'sweeps'},
  'rich': {'experiments', 'sweeps'},
}


def part_of(module: str) -> str:
  """'moe_jax.ops.norm' -> 'ops'; of another package the package's name."""
  package, _, rest = module.partition('.')
  return rest.partition('.')[0] if package == 'moe_jax' else package


def imports(path: pathlib.Path) -> set[str]:
  """Full names of what a file imports, wherever in it."""
  package = path.relative_to(ROOT).parent.as_posix().replace('/', '.')
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        above = package.split('.')[: len(package.split('.')) - node.level + 1]
        base = '.'.join([*above, base] if base else above)
      # `from moe_jax import sharding` imports a module
      found |= {f'{base}.{alias.name}' for alias in node.names} if base == 'moe_jax' else {base}
  return found


@functools.cache
def files() -> dict[pathlib.Path, str]:
  """{file: its part}."""
  found = {p: part_of(p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')) for p in
           sorted((ROOT / 'moe_jax').rglob('*.py'))}  # fmt: skip
  for top in ('experiments', 'sweeps'):
    found |= dict.fromkeys(sorted((ROOT / top).rglob('*.py')), top)
  return {path: part for path, part in found.items() if part != '__init__'}


def violations(part: str, found: set[str]) -> list[str]:
  """What is wrong with the imports of a file of `part`."""
  problems = []
  for name in sorted(found):
    package = name.partition('.')[0]
    if package in TOP[: TOP.index(part) if part in TOP else None]:
      problems.append(f'{name}: the package must not know its experiments, nor these their sweeps')
    elif package == 'moe_jax' and part not in TOP:
      other = part_of(name)
      if other != part and other not in MAY[part]:
        problems.append(f'{name}: {part} may import {sorted(MAY[part])}')
    elif package in ONLY and part not in ONLY[package]:
      problems.append(f'{name}: only for {sorted(ONLY[package])}')
    elif package not in OUTSIDE.get(part, {package}) and package not in STANDARD:
      problems.append(f'{name}: {part} may import {sorted(OUTSIDE[part])}')
  return problems


@pytest.mark.parametrize('path', files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_file_imports_only_what_its_layer_may(path):
  part = files()[path]
  assert part in TOP or part in MAY, f'{part} is new: give it its place in MAY'
  assert violations(part, imports(path)) == []


def test_the_table_has_no_circles():
  done = set()
  while left := {part for part in MAY if part not in done}:
    ready = {part for part in left if MAY[part] <= done}
    assert ready, f'a circle among {sorted(left)}'
    done |= ready


@pytest.mark.parametrize(
  ('part', 'module'),
  [
    ('ops', 'moe_jax.models.moe'),
    ('ops', 'optax'),
    ('ops', 'flax.linen'),
    ('train', 'flax.linen'),
    ('models', 'moe_jax.train.step'),
    ('data', 'moe_jax.models.decoder'),
    ('train', 'experiments.run'),
    ('experiments', 'sweeps.rows'),
    ('config', 'jax'),
    ('analysis', 'ml_collections'),
  ],
)
def test_a_forbidden_import_is_found(part, module):
  assert violations(part, {module}) != []


def test_relative_and_nested_imports_are_seen(monkeypatch):
  path = ROOT / 'moe_jax' / 'ops' / 'norm' / '__init__.py'
  text = 'def f():\n  from ...train import step\n  from .. import rope\n  import a.b\n'
  monkeypatch.setattr(pathlib.Path, 'read_text', lambda *_, **__: text)
  assert imports(path) == {'moe_jax.train', 'moe_jax.ops', 'a.b'}
