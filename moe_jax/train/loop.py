"""A run from its first step, or from where it stopped, to its last. Reads top to bottom."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.config import RunConfig
from moe_jax.data.pipeline import RowSource, batches
from moe_jax.train.checkpoint import Checkpointer
from moe_jax.train.metrics import MetricsWriter
from moe_jax.train.routing_record import Routing, saved_steps
from moe_jax.train.signals import StopSignal
from moe_jax.train.state import TrainState, create
from moe_jax.train.step import jit_train_step, make_eval_step
from moe_jax.train.watch import lost_gradient, make_watch
from moe_jax.train.workdir import Workdir

_log = logging.getLogger(__name__)


class Screen(Protocol):
  """Where progress is shown."""

  def update(self, step: int, values: Mapping[str, Any]) -> None: ...

  def note(self, text: str) -> None: ...


class GaveUp(RuntimeError):
  """The guard refused too often; what was learned up to the last good checkpoint is kept."""


class Finished(NamedTuple):
  state: TrainState
  done: bool  # false when asked to stop before the last step
  steps_run: int  # steps of this process


class Evaluation(NamedTuple):
  loss: float  # nats a token
  bits_per_byte: float
  routing: Routing | None  # None without experts


def state_target(cfg: RunConfig) -> TrainState:
  """Shapes, dtypes and shardings of the state on the current mesh."""
  return jax.eval_shape(functools.partial(create, cfg), jax.random.key(cfg.seed))


def make_evaluate(cfg: RunConfig, source: RowSource) -> Callable[[TrainState], Evaluation]:
  """Evaluation on the first `eval.batches` batches of the validation text, always the same."""
  eval_step = jax.jit(make_eval_step(cfg))
  bytes_V = np.zeros(cfg.model.vocab_size, np.int32)
  lengths = source.tokenizer.byte_lengths_V
  bytes_V[: len(lengths)] = lengths[: cfg.model.vocab_size]

  def evaluate(state: TrainState) -> Evaluation:
    seen = []
    with contextlib.closing(_batches(cfg, source, start=0)) as stream:
      for _ in range(cfg.eval.batches):
        seen.append(eval_step(state, next(stream)[1], bytes_V))
    nats, targets, text_bytes = np.sum([[float(x) for x in s[:3]] for s in seen], axis=0)
    return Evaluation(
      nats / max(targets, 1), nats / np.log(2) / max(text_bytes, 1), Routing.of(seen)
    )

  return evaluate


def train(
  cfg: RunConfig,
  workdir: Workdir,
  screen: Screen,
  *,
  sources: Callable[[str], RowSource],
  initial: Callable[[], Any] | None = None,
) -> Finished:
  """Trains on the current mesh until `cfg.steps`, resuming from the newest good checkpoint.

  Args:
    sources: gives the rows of 'train' and of 'validation'.
    initial: makes the variables that a fresh run starts from; None for random ones.

  Raises:
    GaveUp: after `guard.max_rollbacks` returns to a checkpoint the guard still refuses.
    CheckpointError, OSError: the workdir cannot be written.
  """
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(Checkpointer(workdir.checkpoints, keep=cfg.checkpoint.keep))
    target = state_target(cfg)
    restored = checkpoints.restore(target)
    if restored is not None and restored.step >= cfg.steps:
      return Finished(restored.state, done=True, steps_run=0)

    metrics = stack.enter_context(contextlib.closing(_metrics(cfg, workdir, restored)))
    stop = stack.enter_context(StopSignal())
    run = _Run(cfg, workdir, checkpoints, metrics, screen, sources, target, initial)
    if restored is None:
      state = run.start()
    else:
      state = restored.state
      screen.note(f'resuming after step {restored.step}')
      metrics.event(restored.step, 'resume')
    return run.to_the_end(state, stop)


class _NoMetrics:
  """Stands in on all processes but the first."""

  def write(self, step: int, values: Mapping[str, Any]) -> None: ...

  def event(self, step: int, kind: str, **fields: Any) -> None: ...

  def rewind(self, step: int) -> None: ...

  def close(self) -> None: ...


class _Run:
  """The parts that the loop and its detours share."""

  def __init__(
    self,
    cfg: RunConfig,
    workdir: Workdir,
    checkpoints: Checkpointer,
    metrics: MetricsWriter | _NoMetrics,
    screen: Screen,
    sources: Callable[[str], RowSource],
    target: TrainState,
    initial: Callable[[], Any] | None,
  ):
    self.initial, self.workdir = initial, workdir
    self.cfg, self.checkpoints, self.metrics, self.screen = cfg, checkpoints, metrics, screen
    self.target = target
    self.source = sources('train')
    self.evaluate = make_evaluate(cfg, sources('validation'))
    self.train_step = jit_train_step(cfg)
    self.watch = make_watch(cfg)

  def start(self) -> TrainState:
    """A fresh state; its checkpoint means that there is always one to go back to."""
    state = jax.jit(functools.partial(create, self.cfg))(jax.random.key(self.cfg.seed))
    if self.initial:
      # the random ones go first, so that memory never holds both
      state = state._replace(params=None, router=None)
      variables = self.initial()
      state = state._replace(params=variables['params'], router=variables.get('router', {}))
      self.screen.note(f'parameters from {self.cfg.init_from}')
    self.report_evaluation(0, state)
    self.checkpoints.save(0, state)
    return state

  def report_evaluation(self, step: int, state: TrainState) -> None:
    seen = self.evaluate(state)
    values = {'eval/loss': seen.loss, 'eval/bits_per_byte': seen.bits_per_byte}
    if seen.routing and jax.process_index() == 0:
      earlier = [s for s in saved_steps(self.workdir.path) if s < step]
      before = Routing.load(self.workdir.path, earlier[-1]) if earlier else None
      values |= seen.routing.metrics(before)
      seen.routing.save(self.workdir.path, step)
    self.metrics.write(step, values)
    text = f'loss {seen.loss:.4f}  bits per byte {seen.bits_per_byte:.4f}'
    self.screen.note(f'step {step}: validation {text}')

  def to_the_end(self, state: TrainState, stop: StopSignal) -> Finished:
    cfg, step, steps_run = self.cfg, int(state.step), 0
    stream = _batches(cfg, self.source, start=int(state.batch))
    pending: _Pending | None = None
    previous_s = time.monotonic()
    try:
      while step < cfg.steps:
        asked_s = time.monotonic()
        _, batch = next(stream)
        data_s = time.monotonic() - asked_s
        watched = {}
        if self.watch and step % cfg.log.precision_interval_steps == 0:
          watched = self.watch(state, batch)
        state, device_metrics = self.train_step(state, batch)
        device_metrics |= watched
        step, steps_run = step + 1, steps_run + 1
        # the device is busy with this step; meanwhile the one before is written
        streak, previous_s = self._settle(pending, previous_s)
        pending = _Pending(step, device_metrics, data_s)

        stopping = stop.stop_requested(step)
        saving = step % cfg.checkpoint.interval_steps == 0 or step == cfg.steps or stopping
        evaluating = step % cfg.eval.interval_steps == 0 or step == cfg.steps
        if saving:
          # before this interval is on record the last one is on the disk: a kill loses no more
          self.checkpoints.wait()
        if saving or evaluating or streak >= cfg.guard.rollback_after:
          streak, previous_s = self._settle(pending, previous_s)
          pending = None
        if streak >= cfg.guard.rollback_after:
          state = self._roll_back(step, state, streak)
          step = int(state.step)
          stream.close()
          stream = _batches(cfg, self.source, start=int(state.batch))
          continue
        if evaluating:
          self.report_evaluation(step, state)
        # a state within a streak of refused steps is no place to go back to
        if saving and (streak == 0 or step == cfg.steps or stopping):
          self.checkpoints.save(step, state)
        if saving or evaluating:
          previous_s = time.monotonic()
        if stopping and step < cfg.steps:
          self.checkpoints.wait()
          self.metrics.event(step, 'stop')
          self.screen.note(f'stopped after step {step} as asked; the same command resumes')
          return Finished(state, done=False, steps_run=steps_run)
    finally:
      stream.close()
    self.checkpoints.wait()
    return Finished(state, done=True, steps_run=steps_run)

  def _settle(self, pending: '_Pending | None', previous_s: float) -> tuple[int, float]:
    """Waits for a dispatched step, writes and shows it; returns its refusals in a row, the time."""
    if pending is None:
      return 0, previous_s
    values = {name: _host(value) for name, value in pending.metrics.items()}
    streak = values.pop('guard/streak')
    now_s = time.monotonic()
    values['time/step_s'], values['time/data_s'] = now_s - previous_s, pending.data_s
    values['train/tokens_per_s'] = self.cfg.tokens_per_step / max(now_s - previous_s, 1e-9)
    if not self._writes_load(pending.step):
      values.pop('router/load', None)
    self.metrics.write(pending.step, values)
    self.screen.update(pending.step, values)
    if warning := lost_gradient(values, self.cfg.log.lost_share):
      self.screen.note(f'step {pending.step}: {warning}')
    if values['guard/skipped']:
      reason = f'loss {values["train/loss"]:.4g}, gradient norm {values["train/grad_norm"]:.4g}'
      self.screen.note(f'step {pending.step}: refused ({reason})')
    return streak, now_s

  def _writes_load(self, step: int) -> bool:
    return step in (1, self.cfg.steps) or step % self.cfg.log.load_interval_steps == 0

  def _roll_back(self, step: int, state: TrainState, streak: int) -> TrainState:
    """The last checkpoint, to go on with the batches behind the refused ones."""
    rollbacks, cfg = int(state.guard.rollbacks), self.cfg.guard
    if rollbacks >= cfg.max_rollbacks:
      self.metrics.event(step, 'gave_up', streak=streak, rollbacks=rollbacks)
      raise GaveUp(
        f'step {step}: {streak} steps refused in a row after {rollbacks} rollbacks '
        f'(guard.max_rollbacks={cfg.max_rollbacks}). Lower optim.lr_peak or look at the data; '
        'report.md shows what led here.'
      )
    next_batch, skipped = int(state.batch), int(state.guard.skipped)
    restored = self.checkpoints.restore(self.target)
    assert restored is not None  # step 0 is always saved
    self.metrics.rewind(restored.step)
    self.metrics.event(
      restored.step, 'rollback', from_step=step, streak=streak, next_batch=next_batch
    )
    self.screen.note(
      f'step {step}: {streak} steps refused in a row; back to step {restored.step}, '
      f'and on with batch {next_batch}'
    )
    old = restored.state

    def scalar(value: int) -> jax.Array:
      return jnp.asarray(value, jnp.int32)

    guard = old.guard._replace(
      streak=scalar(0), skipped=scalar(skipped), rollbacks=scalar(rollbacks + 1)
    )
    return old._replace(batch=scalar(next_batch), guard=guard)


class _Pending(NamedTuple):
  """A dispatched step whose metrics have not been read."""

  step: int
  metrics: dict[str, jax.Array]
  data_s: float


def _host(value: jax.Array) -> Any:
  return np.asarray(value).tolist()


def _batches(
  cfg: RunConfig, source: RowSource, *, start: int
) -> Generator[tuple[int, dict[str, jax.Array]]]:
  mesh = jax.sharding.get_mesh()
  return batches(
    source, batch_size=cfg.data.batch_size, sharding=sh.batch_sharding(mesh), start=start
  )


def _metrics(cfg: RunConfig, workdir: Workdir, restored: Any) -> MetricsWriter | _NoMetrics:
  if jax.process_index() != 0:
    return _NoMetrics()
  last_step = 0 if restored is None else restored.step
  return MetricsWriter(workdir.path, cfg.log, config=config_io.to_dict(cfg), last_step=last_step)
