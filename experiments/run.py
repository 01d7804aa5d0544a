"""Trains a model: python -m experiments.run --config=FILE:ARG --workdir=FOLDER
[--config.FIELD=VALUE ...]

The same command resumes a stopped run; a finished one says so. Exit codes: 0 done or stopped as
asked, 1 given up by the guard, 2 bad input or an unusable workdir.
"""

import dataclasses
import datetime
import functools
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import flags as config_flags
from experiments.screen import Card, Component, Progress, make_console, print_card
from moe_jax import config_io, precision, routing
from moe_jax import sharding as sh
from moe_jax.analysis.human import count
from moe_jax.analysis.report import write_report
from moe_jax.analysis.stability import stability
from moe_jax.config import RunConfig
from moe_jax.data.pipeline import RowSource
from moe_jax.infer.decode import generate
from moe_jax.interop.api import open_for
from moe_jax.interop.variables import materialize
from moe_jax.train import cost, loop
from moe_jax.train.checkpoint import CheckpointError
from moe_jax.train.metrics import import_tracker, read_metrics
from moe_jax.train.state import make_model
from moe_jax.train.workdir import Workdir, WorkdirError, atomic_write_text

# what a resumed run may set differently from the run that it goes on with
MAY_CHANGE = ('steps', 'mesh.*', 'checkpoint.*', 'log.*', 'sample.*', 'data.cache_dir')

# dense bf16 peak of a device, FLOP/s, by the vendors' data sheets
PEAK_FLOPS = {'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H200': 989e12}


def run(cfg: RunConfig, path: str, *, overrides: Sequence[str] = (), command: str = '') -> int:
  """Trains `cfg` in the workdir `path`, shows it on the terminal, and returns the exit code.

  Raises:
    ValueError: before anything is written, where the config does not fit the devices or the text.
    WorkdirError, CheckpointError, OSError: the workdir cannot be used.
  """
  check(cfg)
  initial = None
  if cfg.init_from:
    initial = functools.partial(materialize, open_for(cfg.model, cfg.init_from))
  mesh = sh.make_mesh(cfg.check_mesh(jax.device_count()))
  sources = functools.cache(functools.partial(_source, cfg))
  check_vocabulary(cfg, sources('train').tokenizer.vocab_size)
  first = jax.process_index() == 0
  with (
    jax.set_mesh(mesh),
    Workdir.open(path, recorded(cfg), may_change=MAY_CHANGE, defaults=defaults()) as workdir,
  ):
    target = loop.state_target(cfg)
    console = make_console() if first else make_console(open(os.devnull, 'w'))  # noqa: SIM115
    card = _card(cfg, target, overrides)
    print_card(card, console=console)
    for idea in make_model(cfg).balance.ideas:
      if idea.caveat:
        console.print(f'note: {idea.caveat}')
    with Progress(cfg.steps, 0, console=console) as progress:
      try:
        finished = loop.train(cfg, workdir, progress, sources=sources, initial=initial)
      except loop.GaveUp as e:
        if first:
          write_report(workdir.path)
        print(f'given up: {e}', file=sys.stderr)
        return 1
    if not finished.done:
      return 0
    old = _read_json(workdir)
    if not finished.steps_run and old.get('steps') == cfg.steps:
      console.print(
        f'Nothing left to do: {workdir.path} has all {cfg.steps} steps. '
        f'See {workdir.report}, or give --config.steps=N for more.'
      )
      return 0
    summary = _summary(cfg, card, workdir, finished, sources, command)
    if first:
      atomic_write_text(workdir.path / 'summary.json', json.dumps(summary, indent=2) + '\n')
      _show(console, summary, write_report(workdir.path))
  return 0


def check(cfg: RunConfig) -> None:
  """Raises ValueError for what can be refused before a device or a text is looked at."""
  routing.choose(cfg.balance, cfg.routing, cfg.model.moe)
  import_tracker(cfg.log.tracker)
  precision.check_device(cfg)


def check_vocabulary(cfg: RunConfig, vocabulary: int) -> None:
  if vocabulary > cfg.model.vocab_size:
    raise ValueError(
      f'model.vocab_size={cfg.model.vocab_size} is smaller than the {vocabulary} ids of '
      f'data.tokenizer={cfg.data.tokenizer!r}. Raise it, or cut the tokenizer (deepseek:N).'
    )


def recorded(cfg: RunConfig) -> dict[str, Any]:
  """What config.json holds: of the balancing ideas, those in use."""
  used = set(cfg.balance.split('+'))
  routing_fields = {name: fields for name, fields in cfg.routing.items() if name in used}
  return config_io.to_dict(cfg) | {'routing': routing_fields}


def defaults() -> dict[str, Any]:
  """Every field's default; a workdir made before a field existed was made with it."""
  values = config_io.to_dict(RunConfig())
  # these two hold entries that a config names itself
  del values['routing'], values['data']['domains']
  return values


def _source(cfg: RunConfig, split: str) -> RowSource:
  return RowSource(cfg.data, seed=cfg.seed, split=split)


def _card(cfg: RunConfig, target: Any, overrides: Sequence[str]) -> Card:
  counts = cost.parameters(cfg.model, target.params)
  devices = jax.devices()
  # its parameters are no part of a published total
  num, extra = cfg.model.mtp.num_modules, counts.get('mtp')
  ahead = {'multi-token modules': f'{num}, {count(extra.total)} more'} if extra else {}
  processes = f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
  return Card(
    title='moe_jax',
    overrides=list(overrides),
    devices=f'{len(devices)} x {devices[0].device_kind}{processes}',
    mesh=dict(jax.sharding.get_mesh().shape),
    components=[Component(name, *c) for name, c in counts.items() if name != 'mtp'],
    tokens_per_step=cfg.tokens_per_step,
    flops_per_token=cost.flops_per_token(cfg.model, target.params, cfg.data.sequence_length),
    bytes_per_device=cost.predicted_bytes(cfg, target),
    facts={'precision': cfg.precision, 'balance': cfg.balance, 'steps': f'{cfg.steps:,}'} | ahead,
  )


def _summary(
  cfg: RunConfig,
  card: Card,
  workdir: Workdir,
  finished: loop.Finished,
  sources: Any,
  command: str,
) -> dict[str, Any]:
  """What summary.json holds; every process calls it, since sampling takes all devices."""
  text = _sample(cfg, finished, sources('train'))
  if jax.process_index() != 0:
    return {}
  metrics = read_metrics(workdir.path)
  loss, bits = (metrics.series(f'eval/{name}')[1] for name in ('loss', 'bits_per_byte'))
  step_s = metrics.series('time/step_s')[1]
  # the first steps of a process wait for compilation
  tokens_per_s = cfg.tokens_per_step / float(np.median(step_s[min(5, len(step_s) - 1) :]))
  vio = metrics.series('router/max_vio')[1] if 'router/max_vio' in metrics else np.zeros((1, 0))
  device = jax.devices()[0]
  peak = PEAK_FLOPS.get(device.device_kind)
  memory = (device.memory_stats() or {}).get('peak_bytes_in_use')
  num_rows = cfg.eval.batches * cfg.data.batch_size
  return {
    'steps': cfg.steps,
    'tokens': cfg.steps * cfg.tokens_per_step,
    'seconds': float(step_s.sum()),
    'tokens_per_s': tokens_per_s,
    'mfu': tokens_per_s * card.flops_per_token / (peak * jax.device_count()) if peak else None,
    'memory_bytes': {'predicted': card.bytes_per_device, 'peak': memory},
    'eval': {
      'first_loss': float(loss[0]),
      'loss': float(loss[-1]),
      'bits_per_byte': float(bits[-1]),
      'unigram_loss': sources('train').unigram_loss(sources('validation'), num_rows),
    },
    'parameters': {
      'total': sum(c.total for c in card.components),
      'active': sum(c.active for c in card.components),
    },
    'flops_per_token': card.flops_per_token,
    'max_vio': vio[-1].tolist(),
    'stability': dataclasses.asdict(
      stability(metrics.series('train/loss')[1], metrics.series('train/grad_norm')[1])
    ),
    'sample': {'prompt': cfg.sample.prompt, 'text': text},
    'command': command,
    'device': card.devices,
    'date': datetime.date.today().isoformat(),
    'versions': {'python': sys.version.split()[0], 'jax': jax.__version__},
  }


def _sample(cfg: RunConfig, finished: loop.Finished, source: RowSource) -> str:
  tokenizer, s = source.tokenizer, cfg.sample
  state = finished.state
  ids = generate(
    make_model(cfg),
    state.variables,
    tokenizer.encode(s.prompt) or [tokenizer.eos_id],
    num_tokens=s.num_tokens,
    temperature=s.temperature,
    top_p=s.top_p,
    seed=cfg.seed,
    stop_id=tokenizer.eos_id,
  )
  return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size and i != tokenizer.eos_id])


def _read_json(workdir: Workdir) -> dict[str, Any]:
  path = workdir.path / 'summary.json'
  return json.loads(path.read_text()) if path.is_file() else {}


def _show(console: Any, summary: dict[str, Any], report: Any) -> None:
  scores = summary['eval']
  console.print(
    f'\nvalidation loss {scores["loss"]:.4f} (at first {scores["first_loss"]:.4f}, unigram '
    f'{scores["unigram_loss"]:.4f})   bits per byte {scores["bits_per_byte"]:.4f}'
  )
  if summary['max_vio']:
    console.print('MaxVio by layer ' + ' '.join(f'{v:.2f}' for v in summary['max_vio']))
  console.print(f'\n{summary["sample"]["prompt"]}{summary["sample"]["text"]}\n')
  console.print(f'report: {report}')


def main(argv: Sequence[str]) -> int:
  values = flags.FlagValues()
  config = config_flags.define(values)
  workdir = flags.DEFINE_string(
    'workdir', None, 'Folder of the run; the same folder resumes it.', flag_values=values
  )
  distributed = flags.DEFINE_string(
    'distributed',
    None,
    'Start jax.distributed: "auto" on a cluster that jax knows, or '
    'COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID.',
    flag_values=values,
  )
  logging.basicConfig(format='%(levelname)s %(message)s', level=logging.WARNING)
  if {'--help', '-h'} & set(argv):
    print(__doc__, values.get_help(), sep='\n')
    return 0
  try:
    raw, overrides = config_flags.parse(argv, values, config)
    if not workdir.value:
      raise config_flags.UsageError('--workdir is missing. Name a folder, such as runs/first.')
    cfg = config_io.build(raw.to_dict())
    _start_distributed(distributed.value)
    command = f'python -m experiments.run {shlex.join(argv[1:])}'
    return run(cfg, workdir.value, overrides=overrides, command=command)
  except (ValueError, WorkdirError, CheckpointError) as e:
    print(f'error: {config_flags.one_line(e)}', file=sys.stderr)
  except OSError as e:
    where = f' ({e.filename})' if e.filename else ''
    print(f'error: cannot read or write{where}: {e.strerror or e}.', file=sys.stderr)
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    print(
      f'error: out of device memory: {config_flags.one_line(e)}. Raise microbatches, set '
      "model.remat='full', lower data.batch_size, or use more devices.",
      file=sys.stderr,
    )
  return 2


def _start_distributed(how: str | None) -> None:
  if not how:
    return
  if how == 'auto':
    jax.distributed.initialize()
    return
  try:
    address, num_processes, process_id = how.split(',')
    jax.distributed.initialize(address, int(num_processes), int(process_id))
  except (TypeError, ValueError):
    raise config_flags.UsageError(
      f'--distributed={how!r} must be "auto" or HOST:PORT,NUM_PROCESSES,PROCESS_ID.'
    ) from None


if __name__ == '__main__':
  sys.exit(main(sys.argv))
