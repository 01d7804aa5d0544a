"""Writes a workdir's report.md and pictures from metrics.jsonl, config.json, summary.json alone.

  python -m moe_jax.analysis.report WORKDIR

A run that has not finished has no summary yet; its report has what is known.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from moe_jax.analysis import figures, human, routing_figures, style
from moe_jax.analysis.stability import stability
from moe_jax.config import RunConfig
from moe_jax.config_io import flatten, to_dict
from moe_jax.train.metrics import Metrics, first_moe_layer, read_metrics


def write_report(workdir: str | Path) -> Path:
  """Draws report/*.png, writes report.md and returns its path."""
  workdir = Path(workdir)
  metrics = read_metrics(workdir)
  config, summary = (_load(workdir / name) for name in ('config.json', 'summary.json'))
  first_layer = first_moe_layer(config)
  drawn: dict[str, Figure | None] = {
    'loss': figures.loss_figure(metrics, summary),
    'load': figures.load_figure(metrics, first_layer=first_layer),
    'balance': figures.balance_figure(metrics, summary, first_layer=first_layer),
    'specialisation': routing_figures.specialisation_figure(
      workdir, sorted(config.get('data', {}).get('domains', {})), first_layer=first_layer
    ),
    'saturation': routing_figures.saturation_figure(workdir, first_layer=first_layer),
    'precision': figures.precision_figure(metrics),
    'optim': figures.optim_figure(metrics, clip_norm=config.get('optim', {}).get('clip_norm')),
  }
  folder = workdir / 'report'
  folder.mkdir(exist_ok=True)
  pictures = []
  for name, figure in drawn.items():
    if figure is None:
      (folder / f'{name}.png').unlink(missing_ok=True)  # of an earlier run of this workdir
      continue
    with matplotlib.rc_context(style.STYLE):
      figure.savefig(folder / f'{name}.png')
    title = ' '.join(figure.get_suptitle().split())
    pictures.append(f'![{title}](report/{name}.png)')
  parts = [
    f'# {workdir.resolve().name}',
    _table(('', ''), _headline(metrics, summary)),
    *pictures,
    *_sample(summary.get('sample') or {}),
    *_reproduction(summary),
    *_changes(config),
    *_events(metrics),
  ]
  path = workdir / 'report.md'
  path.write_text('\n\n'.join(parts) + '\n')
  return path


def _load(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.is_file() else {}


def _headline(metrics: Metrics, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
  """The rows of the first table; what the run did not measure is left out."""
  rows: list[tuple[str, str]] = []
  scores, sizes = summary.get('eval') or {}, summary.get('parameters') or {}
  if scores.get('loss') is not None:
    text = f'**{scores["loss"]:.3f}** nats per token'
    if scores.get('first_loss') is not None:
      text += f', {scores["first_loss"]:.3f} before training'
    rows.append(('Validation loss', text))
  if scores.get('unigram_loss') is not None:
    rows.append(('Unigram baseline', f'{scores["unigram_loss"]:.3f} nats per token'))
  if scores.get('bits_per_byte') is not None:
    rows.append(('Bits per byte', f'**{scores["bits_per_byte"]:.3f}**'))
  if sizes:
    text = f'{human.count(sizes["total"])}, {human.count(sizes["active"])} active per token'
    rows.append(('Parameters', text))
  steps = summary.get('steps', max((row['step'] for row in metrics.rows), default=0))
  text = f'{steps:,}' if summary else f'{steps:,} so far; the run has not finished'
  if summary.get('tokens'):
    text += f', {human.count(summary["tokens"])} tokens'
  rows.append(('Steps', text))
  if summary.get('seconds'):
    rows.append(('Time', human.duration(summary['seconds'])))
  rate = summary.get('tokens_per_s')  # without compilation and pauses, if the loop has told
  if not rate and summary.get('tokens') and summary.get('seconds'):
    rate = summary['tokens'] / summary['seconds']
  if rate:
    mfu = f', {summary["mfu"]:.1%} of peak FLOPs' if summary.get('mfu') else ''
    rows.append(('Tokens per second', f'{human.count(rate)}{mfu}'))
  memory = {k: v for k, v in (summary.get('memory_bytes') or {}).items() if v}
  if memory:
    text = ', '.join(f'{human.size(v)} {k}' for k, v in memory.items())
    rows.append(('Memory per device', text))
  if summary.get('max_vio'):
    layers = ', '.join(f'{x:.2f}' for x in summary['max_vio'])
    rows.append(('MaxVio at the end', f'**{max(summary["max_vio"]):.2f}** (by layer: {layers})'))
  if 'router/max_vio_global' in metrics:
    vio_L = metrics.series('router/max_vio_global')[1][-1]
    text = f'**{vio_L.max():.2f}** (mean over layers: {vio_L.mean():.2f})'
    rows.append(('MaxVio over the validation text', text))
  if 'train/grad_norm' in metrics and 'train/loss' in metrics:
    found = stability(metrics.series('train/loss')[1], metrics.series('train/grad_norm')[1])
    text = f'{found.loss_spikes} of the loss, {found.grad_spikes} of the gradient'
    rows.append(('Spikes', text))
  if 'guard/skipped_total' in metrics:
    rows.append(('Refused steps', f'{metrics.series("guard/skipped_total")[1][-1]:.0f}'))
  if summary.get('device'):
    rows.append(('Device', str(summary['device'])))
  return rows


def _sample(sample: Mapping[str, str]) -> list[str]:
  if not sample.get('text'):
    return []
  prompt, text = sample.get('prompt', ''), sample['text']
  whole = text if text.startswith(prompt) else prompt + text
  return ['## Sample', f'The model went on from {_code(prompt)}:', _fenced(whole)]


def _reproduction(summary: Mapping[str, Any]) -> list[str]:
  if not summary.get('command'):
    return []
  where = ', '.join(str(summary[k]) for k in ('device', 'date') if summary.get(k))
  return ['## Command', _fenced(summary['command'], 'sh'), *([f'Run on {where}.'] if where else [])]


def _changes(config: Mapping[str, Any]) -> list[str]:
  """The settings that differ from the defaults of `RunConfig`."""
  defaults = flatten(to_dict(RunConfig()))
  changed = [(k, v) for k, v in flatten(config).items() if k not in defaults or defaults[k] != v]
  if not changed:
    return []
  rows = [
    (_code(k), _code(json.dumps(v)), _code(json.dumps(defaults[k])) if k in defaults else '')
    for k, v in changed
  ]
  return ['## Settings that differ from the defaults', _table(('field', 'value', 'default'), rows)]


def _events(metrics: Metrics) -> list[str]:
  if not metrics.events:
    return []
  rows = [
    (
      f'{e["step"]}',
      str(e['event']),
      ', '.join(f'{k} {v}' for k, v in e.items() if k not in ('step', 'event')),
    )
    for e in metrics.events
  ]
  return ['## Events', _table(('step', 'event', ''), rows)]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  cells = [head, ('---',) * len(head), *rows]
  escaped = [[cell.replace('|', '\\|').replace('\n', ' ') for cell in row] for row in cells]
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in escaped)


def _fenced(text: str, language: str = '') -> str:
  """A code block whose fence is longer than any run of backticks in the text."""
  fence = '`' * max(3, _longest_run(text) + 1)
  return f'{fence}{language}\n{text}\n{fence}'


def _code(text: str) -> str:
  marks = '`' * (_longest_run(text) + 1)
  pad = ' ' if len(marks) > 1 else ''
  return f'{marks}{pad}{text}{pad}{marks}'


def _longest_run(text: str) -> int:
  return max((len(run) for run in re.findall('`+', text)), default=0)


if __name__ == '__main__':
  print(write_report(sys.argv[1]))
