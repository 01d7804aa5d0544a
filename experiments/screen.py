"""What a run shows: the card before it starts, a live bar on a terminal, plain lines anywhere else.

Nothing here changes a run; without a terminal no control codes are written, whatever the
environment asks for.
"""

# L MoE layers

import collections
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from moe_jax.analysis.human import count, duration, size

RECENT = 50  # steps that the time left is predicted from


@dataclasses.dataclass(frozen=True)
class Component:
  """One row of the parameter table."""

  name: str
  total: int
  active: int  # of these, the ones that one token uses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
  """What is about to run. `facts` are further lines, shown last."""

  title: str
  overrides: Sequence[str]  # as given: 'optim.lr_peak=1e-3'
  devices: str
  mesh: Mapping[str, int]
  components: Sequence[Component]
  tokens_per_step: int
  flops_per_token: float  # forward and backward
  bytes_per_device: int
  facts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def make_console(file: TextIO | None = None) -> Console:
  """A console that styles its output only where a person is looking."""
  stream: TextIO = file or sys.stdout
  live = stream.isatty() and os.environ.get('TERM', '') not in ('', 'dumb')
  return Console(
    file=stream,
    force_terminal=live,  # rich would obey FORCE_COLOR into a log file
    color_system='auto' if live else None,
    width=None if live else 100,
    highlight=False,
    markup=False,
    emoji=False,
  )


def print_card(card: Card, *, console: Console | None = None) -> None:
  console = console or make_console()
  mesh = ', '.join(f'{axis} {n}' for axis, n in card.mesh.items())
  overrides = '\n'.join(card.overrides) or 'none'
  above = {'overrides': overrides, 'devices': card.devices, 'mesh': mesh}
  below = {
    'tokens per step': f'{card.tokens_per_step:,}',
    'FLOPs per token': count(card.flops_per_token),
    'memory per device': f'{size(card.bytes_per_device)} predicted',
    **card.facts,
  }
  width = max(len(key) for key in (*above, *below))
  title = Text(card.title, style='bold')
  table = _parameter_table(card.components)
  with console.capture() as captured:
    console.print(Group(title, _lines(above, width), '', table, '', _lines(below, width), ''))
  # cells are padded to their column's width: no blanks at line ends in a log
  console.file.write('\n'.join(line.rstrip() for line in captured.get().split('\n')))
  console.file.flush()


def _lines(facts: Mapping[str, str], width: int) -> Table:
  table = Table.grid(Column(style='cyan', width=width), Column(overflow='fold'), padding=(0, 2))
  for key, value in facts.items():
    table.add_row(key, Text(value))
  return table


def _parameter_table(components: Sequence[Component]) -> Table:
  total, active = (sum(getattr(c, field) for c in components) for field in ('total', 'active'))
  table = Table(
    box=box.SIMPLE, show_footer=True, show_edge=False, pad_edge=False, border_style='dim'
  )
  table.add_column('parameters', 'all', header_style='cyan', footer_style='bold')
  sums = {'total': count(total), 'share': '', 'active per token': count(active)}
  for name, footer in sums.items():
    table.add_column(name, footer, justify='right', footer_style='bold', header_style='cyan')
  for c in components:
    share = f'{c.total / total:.1%}' if total else ''
    table.add_row(c.name, count(c.total), share, count(c.active))
  return table


class Progress:
  """Progress of training: a live bar on a terminal, otherwise a plain line now and then.

  Plain lines come for the first and the last step and never more often than `interval_s`.

  Args:
    total_steps: step at which the run is done.
    start_step: steps done before this process, 0 for a new run.
    clock: seconds; replaced by tests.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int,
    *,
    console: Console | None = None,
    interval_s: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._total, self._interval_s, self._clock = total_steps, interval_s, clock
    self._console = console or make_console()
    self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=RECENT)
    self._started_s = clock()
    self._printed_s: float | None = None
    self._waiting: tuple[int, str] | None = None  # the newest line, where it was not printed
    self._redirected: list[tuple[logging.StreamHandler, Any]] = []
    self._bar = None
    if self._console.is_terminal:
      self._bar = Bar(
        TextColumn('{task.completed:.0f}/{task.total:.0f}', table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        TextColumn('{task.fields[text]}', table_column=Column(no_wrap=True)),
        console=self._console,
        expand=True,
        refresh_per_second=4,
      )
      self._task = self._bar.add_task('', total=total_steps, completed=start_step, text='starting')

  def __enter__(self) -> Self:
    if self._bar:
      before = (sys.stderr, sys.stdout)
      self._bar.start()  # prints and warnings now appear above the bar
      # log handlers made earlier hold the real stream: lend them the redirected one
      for handler in _stream_handlers():
        if handler.stream in before:
          self._redirected.append((handler, handler.stream))
          handler.setStream(sys.stderr)
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
  ) -> None:
    if self._bar:
      self._bar.stop()
      for handler, stream in self._redirected:
        handler.setStream(stream)
    elif self._waiting:
      self._print(*self._waiting)

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    """Shows the metrics of a finished step, named as in metrics.jsonl."""
    now = self._clock()
    if self._recent and step <= self._recent[-1][0]:
      self._recent.clear()  # a rollback: the past says nothing about the time left
    self._recent.append((step, now))
    if step < self._total:
      left_s = self._left_s(step)
      when = f'left {"--" if left_s is None else duration(left_s)}'
    else:
      when = f'took {duration(now - self._started_s)}'
    text = f'{describe(values)}  {when}'
    if self._bar:
      self._bar.update(self._task, completed=step, text=text)
      return
    self._waiting = (step, text)
    due = self._printed_s is None or now - self._printed_s >= self._interval_s
    if due or step >= self._total:
      self._print(step, text)
      self._printed_s = now

  def note(self, text: str) -> None:
    """Prints a line above the bar: an evaluation, a warning, a resume."""
    self._console.print(Text(text), soft_wrap=True)
    self._console.file.flush()

  def _left_s(self, step: int) -> float | None:
    (first, since), (_, now) = self._recent[0], self._recent[-1]
    if step == first:
      return None  # the first step of a process is mostly compilation
    return (now - since) / (step - first) * (self._total - step)

  def _print(self, step: int, text: str) -> None:
    self._waiting = None
    digits = len(str(self._total))
    self.note(f'step {step:{digits}}/{self._total}  {text}')


def describe(values: Mapping[str, Any]) -> str:
  """'loss 5.123  12.3k tok/s  grad 0.51  load 1.32x', of what is there."""
  parts = []
  if 'train/loss' in values:
    parts.append(f'loss {float(values["train/loss"]):.3f}')
  if 'train/tokens_per_s' in values:
    parts.append(f'{count(float(values["train/tokens_per_s"]))} tok/s')
  if 'train/grad_norm' in values:
    parts.append(f'grad {float(values["train/grad_norm"]):.2f}')
  vio_L = np.asarray(values.get('router/max_vio', []), np.float64)
  if vio_L.size:
    parts.append(f'load {1 + vio_L.max():.2f}x')  # the busiest expert of all layers over the mean
  if values.get('guard/skipped'):
    parts.append('refused')
  return '  '.join(parts)


def _stream_handlers() -> list[logging.StreamHandler]:
  loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
  found = [h for logger in loggers for h in getattr(logger, 'handlers', ())]
  inner = [getattr(h, 'python_handler', h) for h in found]  # absl, which Orbax logs by, wraps one
  return [h for h in inner if isinstance(h, logging.StreamHandler)]
