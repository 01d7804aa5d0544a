"""A search by Optuna: the sweep's file defines `search(trial)`, which returns overrides.

The study lies in study.db beside the rows, so a search resumes too. Validation losses are reported
as they appear in metrics.jsonl; a run that the pruner gives up is stopped and marked. What the file
may define besides: TRIALS (20), and STUDY, arguments of optuna.create_study such as a sampler or a
pruner. Lower validation loss is better.
"""

import logging
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from sweeps.record import Follower, Record, State
from sweeps.rows import Base, Row, SweepError, describe
from sweeps.tables import need

PROBES = 16  # rows drawn at random and checked before anything starts
STARTUP_TRIALS = 4  # that the default pruner leaves alone

_log = logging.getLogger(__name__)


class Search:
  """A Source (see sweeps.drive) of rows that Optuna proposes.

  Args:
    jobs: rows under way at the same time.
  """

  def __init__(self, module: ModuleType, base: Base, *, jobs: int):
    self._optuna = need('optuna')
    self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
    self._module, self._base, self._jobs = module, base, jobs
    self.num_trials = getattr(module, 'TRIALS', 20)
    self.rows: list[Row] = []
    self.records: dict[Row, Record] = {}
    self._trials: dict[Row, Any] = {}
    self._reported: dict[Row, set[int]] = {}
    self._pruned: set[Row] = set()
    self._half_done: list[Row] = []
    self._asked = 0
    self._study: Any = None

  def check(self) -> None:
    """Refuses a search whose rows are impossible, by random ones of them."""
    probe = self._optuna.create_study(sampler=self._optuna.samplers.RandomSampler(seed=0))
    for number in range(1, PROBES + 1):
      trial = probe.ask()
      overrides = self._overrides(trial)
      try:
        self._base.row(number, overrides)
      except ValueError as e:
        raise SweepError(f'trial ({describe(overrides)}): {" ".join(str(e).split())}') from e

  def open(self) -> 'Search':
    """Makes the study, or goes on with it: trials that were under way come first."""
    optuna, storage = self._optuna, f'sqlite:///{self._base.folder / "study.db"}'
    settings = {
      'pruner': optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
      **getattr(self._module, 'STUDY', {}),
    }
    self._study = optuna.create_study(
      storage=storage, study_name='sweep', load_if_exists=True, direction='minimize', **settings
    )
    old = self._study.get_trials(deepcopy=False)
    if 'sampler' not in settings:
      # a sampler of the same seed would propose the first trials again
      self._study.sampler = optuna.samplers.TPESampler(seed=len(old))
    self._asked = len(old)
    for frozen in old:
      self._restore(frozen)
    return self

  def take(self, room: int) -> list[Row]:
    taken: list[Row] = []
    under_way = sum(self.records[row].state is State.RUNNING for row in self.rows)
    room = min(room, self._jobs - under_way)
    while len(taken) < room and (self._half_done or self._asked < self.num_trials):
      row = self._half_done.pop(0) if self._half_done else self._ask()
      if row is None:
        continue
      if self.records[row].state.final:
        self._tell(row)  # an earlier trial, or launcher, has run the same row
      else:
        taken.append(row)
    return taken

  def watch(self, row: Row, seen: Follower) -> bool:
    if not self._report(row, seen) or not self._trials[row].should_prune():
      return False
    self._pruned.add(row)
    return True

  def ended(self, row: Row, seen: Follower) -> None:
    record = self.records[row]
    if record.state is State.STOPPED and row in self._pruned:
      record.state = State.PRUNED
    self._report(row, seen)
    if record.state.final:
      self._tell(row)

  def _report(self, row: Row, seen: Follower) -> bool:
    """Tells the study of new validation losses; false where there are none."""
    reported = self._reported[row]
    new = {s: loss for s, loss in seen.evaluations.items() if s > 0 and s not in reported}
    for step, loss in sorted(new.items()):
      self._trials[row].report(loss, step)
    reported |= set(new)
    return bool(new) and max(new) < row.cfg.steps

  def _overrides(self, trial: Any) -> Mapping[str, Any]:
    overrides = self._module.search(trial)
    if not isinstance(overrides, Mapping):
      raise SweepError(f'search(trial) returned {overrides!r}. Return a dict of overrides.')
    return overrides

  def _ask(self) -> Row | None:
    self._asked += 1
    return self._add(self._study.ask())

  def _add(self, trial: Any) -> Row | None:
    """The row of a trial; None, and the trial fails, where it is impossible."""
    overrides = self._overrides(trial)  # of a trial that is resumed: the same as before
    try:
      row = self._base.row(trial.number + 1, overrides)
    except ValueError as e:
      _log.warning('trial %d (%s) fails: %s', trial.number + 1, describe(overrides), e)
      self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
      return None
    self._keep(row, trial, reported=set())
    return row

  def _keep(self, row: Row, trial: Any, *, reported: set[int]) -> None:
    self.rows.append(row)
    self.records[row] = Record.read(row)
    self._trials[row], self._reported[row] = trial, reported

  def _restore(self, frozen: Any) -> None:
    if frozen.state is self._optuna.trial.TrialState.RUNNING:
      trial = self._optuna.trial.Trial(self._study, frozen._trial_id)
      if row := self._add(trial):
        self._reported[row] |= set(frozen.intermediate_values)
        self._half_done.append(row)
      return
    # replays the parameters that it had; nothing is told about it any more
    overrides = self._overrides(self._optuna.trial.FixedTrial(frozen.params, frozen.number))
    try:
      row = self._base.row(frozen.number + 1, overrides)
    except ValueError:
      return
    self._keep(row, None, reported=set())

  def _tell(self, row: Row) -> None:
    states, record = self._optuna.trial.TrialState, self.records[row]
    loss = (row.summary() or {}).get('eval', {}).get('loss', math.nan)
    value, state = None, states.FAIL
    if record.state is State.DONE and math.isfinite(loss):
      value, state = loss, states.COMPLETE
    elif record.state is State.PRUNED:
      state = states.PRUNED
    try:
      self._study.tell(self._trials[row], value, state=state)
    except RuntimeError as e:
      if 'Study.stop' not in str(e):
        raise
      # a sampler that has no more points, such as GridSampler; what was told is stored
      self.num_trials = self._asked
