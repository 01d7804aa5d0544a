"""Runs a sweep: python -m sweeps.run --sweep=sweeps/balance.py --workdir=runs/balance --jobs=2

Every row is a process of experiments.run with a workdir of its own, in rows/. The same command
resumes: finished rows are skipped, a half-done one goes on from its checkpoint. Tables of all rows
are results.parquet, results.csv, steps.parquet and steps.csv. --config.FIELD=VALUE sets a field of
every row. Exit codes: 0 all rows are done, 1 some failed, 2 bad input, 130 or 143 stopped by Ctrl-C
or SIGTERM.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from experiments.flags import UsageError, one_line, parse_flags
from experiments.screen import make_console
from moe_jax.train.workdir import Workdir, WorkdirError
from sweeps.drive import Drive, ListSource
from sweeps.local import Launcher, LocalLauncher
from sweeps.rows import (
  Base,
  SweepError,
  command_line,
  common_flags,
  load_file,
  make_rows,
)
from sweeps.screen import Screen
from sweeps.search import Search
from sweeps.slurm import SlurmLauncher
from sweeps.tables import import_pandas

LAUNCHERS = ('local', 'slurm')


def main(argv: Sequence[str]) -> int:
  logging.basicConfig(format='%(levelname)s %(message)s', level=logging.WARNING)
  # this process trains nothing: the memory of a GPU is for the rows
  jax.config.update('jax_platforms', 'cpu')
  own, common = common_flags(argv)
  values = _define()
  if {'--help', '-h'} & set(argv):
    print(__doc__, values.get_help(), sep='\n')
    return 0
  try:
    parse_flags(own, values)
    return _run(values, common)
  except (ValueError, WorkdirError) as e:
    lines = str(e).splitlines() if isinstance(e, SweepError) else [one_line(e)]
    print(*(f'error: {line}' for line in lines), sep='\n', file=sys.stderr)
  except OSError as e:
    where = f' ({e.filename})' if e.filename else ''
    print(f'error: cannot read or write{where}: {e.strerror or e}.', file=sys.stderr)
  except KeyboardInterrupt:
    return 130
  return 2


def _define() -> flags.FlagValues:
  values = flags.FlagValues()
  text, number, yes = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool
  text('sweep', None, 'File that defines sweep() or search(trial).', flag_values=values)
  text('workdir', None, 'Folder of the sweep; the same folder resumes it.', flag_values=values)
  text('config', None, "Config of every row; default the file's CONFIG.", flag_values=values)
  number('jobs', 1, 'Rows that run at the same time.', 1, flag_values=values)
  text('devices', '', 'CUDA devices dealt out to the jobs, such as 0,1,2,3.', flag_values=values)
  yes('retry', False, 'Run rows that have failed once more.', flag_values=values)
  yes('dry_run', False, 'Check all rows and print their commands.', flag_values=values)
  text('launcher', 'local', f'One of {", ".join(LAUNCHERS)}.', flag_values=values)
  text(
    'slurm',
    '',
    "submitit's parameters, such as partition=gpu,time=600,gpus_per_node=1.",
    flag_values=values,
  )
  return values


def _run(values: flags.FlagValues, common: tuple[str, ...]) -> int:
  import_pandas()
  file, folder = _required(values, 'sweep'), Path(_required(values, 'workdir')).absolute()
  module = load_file(file)
  config = values.config or getattr(module, 'CONFIG', None)
  if not config:
    raise SweepError(f'--config is missing, and {file} has no CONFIG. Name a config file.')
  launcher = _launcher(values, folder)
  base, source = Base(config, common, folder), None
  if hasattr(module, 'search'):
    search = Search(module, base, jobs=values.jobs)
    search.check()
    if values.dry_run:
      print(f'{file}: a search of {search.num_trials} trials; those tried are possible.')
      return 0
  else:
    rows = make_rows(module.sweep(), base)
    if values.dry_run:
      print(*(f'{row.number:3}  {row.label}\n     {command_line(row)}' for row in rows), sep='\n')
      return 0
    search, source = None, ListSource(rows, retry=values.retry)
  about = {'sweep': os.path.relpath(file), 'config': config, 'common': list(common)}
  # rows whose config has changed have been refused already
  with Workdir.open(folder, about, may_change=('config', 'common')):
    if search:
      source = search.open()
    assert source is not None
    return Drive(source, launcher, Screen(make_console()), folder).run()


def _required(values: flags.FlagValues, name: str) -> str:
  value = values[name].value
  if not value:
    example = {'sweep': 'sweeps/balance.py', 'workdir': 'runs/sweeps/balance'}[name]
    raise UsageError(f'--{name} is missing. Name one, such as {example}.')
  return value


def _launcher(values: flags.FlagValues, folder: Path) -> Launcher:
  devices = [d for d in values.devices.split(',') if d]
  if devices and len(devices) < values.jobs:
    raise UsageError(
      f'--devices={values.devices} names {len(devices)} for --jobs={values.jobs}. '
      'Name one for each job.'
    )
  # rows of one shape compile once
  env = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'), **os.environ}
  if values.launcher == 'slurm':
    return SlurmLauncher(folder / 'slurm', values.jobs, values.slurm, env=env)
  if values.launcher != 'local':
    raise UsageError(f'--launcher={values.launcher} is not one of {", ".join(LAUNCHERS)}.')
  return LocalLauncher(values.jobs, devices=devices, env=env)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
