"""Two tidy tables of a sweep, as parquet and CSV: results (a line a row) and steps.

`results` has the row's number, name, state and error, its seed, a column for every field that some
row overrides, what summary.json says, and the last value of every metric. A metric of each
layer is there as its mean and its maximum over layers. `steps` is long: row, name, step, metric,
layer (missing where a metric has none), value; the load of every expert stays in the workdir.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config_io import flatten, to_dict
from moe_jax.train.metrics import first_moe_layer, read_metrics
from moe_jax.train.workdir import atomic_write_text
from sweeps.record import Record
from sweeps.rows import Row, SweepError

FROM_SUMMARY = ('tokens', 'seconds', 'tokens_per_s', 'mfu', 'parameters', 'flops_per_token')


def import_pandas() -> Any:
  """pandas, which needs pyarrow for parquet; raises SweepError where either is missing."""
  return [need('pyarrow'), need('pandas')][1]


def need(name: str) -> Any:
  """Imports a package of the extra `sweeps`."""
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as e:
    raise SweepError(f'{name} is not installed. Run `uv sync --extra sweeps`.') from e


def write_tables(folder: Path, rows: Sequence[Row], records: Mapping[Row, Record]) -> None:
  """Writes results.parquet, results.csv, steps.parquet and steps.csv into `folder`."""
  pd = import_pandas()
  per_row, per_step = [], []
  fields = {name: None for row in rows for name in row.overrides if name != 'seed'}
  for row in rows:
    series = _series(row)
    per_row.append(_result(row, records[row], list(fields), series))
    per_step += _steps(pd, row, series)
  columns = ['row', 'name', 'step', 'metric', 'layer', 'value']
  steps = pd.concat(per_step) if per_step else pd.DataFrame(columns=columns)
  _write(folder / 'results', pd.DataFrame(_one_type_a_column(per_row)))
  _write(folder / 'steps', steps)


def _series(row: Row) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{metric: (steps [N], values [N] or [N, L])}."""
  if not row.workdir.metrics.is_file():
    return {}
  metrics = read_metrics(row.folder)
  every = {name: metrics.series(name) for name in metrics.names}
  return {name: s for name, s in every.items() if s[1].ndim <= 2}


def _result(
  row: Row, record: Record, fields: list[str], series: Mapping[str, Any]
) -> dict[str, Any]:
  about = {
    'row': row.number,
    'name': row.name,
    'state': str(record.state),
    'error': record.error,
    'seed': row.cfg.seed,
  }
  config = flatten(to_dict(row.cfg))
  settings = {name: row.overrides.get(name, config.get(name)) for name in fields}
  summary = row.summary() or {}
  said = flatten({name: summary[name] for name in FROM_SUMMARY if name in summary})
  last: dict[str, float] = {}
  for name, (_, values) in series.items():
    if values.ndim == 1:
      last[name] = float(values[-1])
    elif values.shape[1]:
      last[f'{name}.mean'], last[f'{name}.max'] = values[-1].mean(), values[-1].max()
  return about | settings | said | last


def _steps(pd: Any, row: Row, series: Mapping[str, Any]) -> list[Any]:
  first_layer = first_moe_layer({'model': {'num_dense_layers': row.cfg.model.num_dense_layers}})
  frames = []
  for name, (steps, values) in series.items():
    num_layers = values.shape[1] if values.ndim == 2 else 1
    layer = np.arange(first_layer, first_layer + num_layers)
    frames.append(
      pd.DataFrame(
        {
          'row': row.number,
          'name': row.name,
          'step': np.repeat(steps, num_layers),
          'metric': name,
          'layer': pd.array(
            np.tile(layer, len(steps)) if values.ndim == 2 else [None] * len(steps), dtype='Int64'
          ),
          'value': values.reshape(-1),
        }
      )
    )
  return frames


def _one_type_a_column(per_row: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Parquet holds one type a column: fields that take numbers and words become words."""
  names = {name: None for row in per_row for name in row}
  for name in names:
    values = [row[name] for row in per_row if row.get(name) is not None]
    kinds = {float if type(v) is int else type(v) for v in values}
    if len(kinds) > 1 or any(isinstance(v, tuple | list) for v in values):
      for row in per_row:
        row[name] = None if row.get(name) is None else str(row[name])
  return [{name: row.get(name) for name in names} for row in per_row]


def _write(path: Path, frame: Any) -> None:
  atomic_write_text(path.with_suffix('.csv'), frame.to_csv(index=False))
  partial = path.with_suffix('.parquet.partial')
  frame.to_parquet(partial, index=False)
  partial.replace(path.with_suffix('.parquet'))
