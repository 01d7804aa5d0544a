"""A run that is killed twenty times is, in the end, the run that never was."""

import random
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.run.program import Program, bits, checkpoint_steps, last_step, lines, restore

pytestmark = pytest.mark.chaos

INTERVAL, STEPS, KILLS = 25, 600, 20
ARGUMENTS = (
  f'--config.steps={STEPS}',
  f'--config.checkpoint.interval_steps={INTERVAL}',
  '--config.eval.interval_steps=100',
)


def unfinished(workdir: Path) -> set[int]:
  """The saves that never ended, each with a number of its own."""
  return {p.stat().st_ino for p in (workdir / 'checkpoints').glob('*.partial')}


def kill_after(process: subprocess.Popen, workdir: Path, *, steps: int, seconds: float) -> None:
  """Kills `seconds` after the process has recorded so many steps; 0 does not wait for the first."""
  started_at = recorded(workdir)
  until = time.monotonic() + 120
  while steps and recorded(workdir) < started_at + steps:
    assert process.poll() is None, f'ended by itself: {process.communicate()}'
    assert time.monotonic() < until, 'no progress'
    time.sleep(0.001)
  time.sleep(seconds)
  process.kill()


def recorded(workdir: Path) -> int:
  """Lines of metrics.jsonl; a resume first drops some and then adds its event."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def test_kills_lose_at_most_an_interval_and_change_nothing_in_the_end(tmp_path):
  program, instants = Program(tmp_path), random.Random(0)
  straight, workdir = tmp_path / 'straight', tmp_path / 'killed'
  result = program.run(straight, *ARGUMENTS)
  assert result.code == 0, result.err

  resumed, in_a_save, in_the_start = [], 0, 0
  for kill in range(KILLS):
    before, old = checkpoint_steps(workdir), unfinished(workdir)
    # compiled functions are read but not kept: a half-written one is not what is tested
    with program.start(workdir, *ARGUMENTS, keep=False) as process:
      try:
        if kill % 4 == 3:  # before it has done anything: reading the config, restoring
          in_the_start += 1
          kill_after(process, workdir, steps=0, seconds=instants.uniform(0, 5))
        else:
          steps = instants.randint(1, 2 * INTERVAL)
          kill_after(process, workdir, steps=steps, seconds=instants.uniform(0, 0.1))
      finally:
        process.kill()
      out, _ = process.communicate()
    assert process.returncode == -9

    if match := re.search(r'resuming after step (\d+)', out):
      # what was there when it began is what it went on with
      assert int(match[1]) == before[-1]
      resumed.append(int(match[1]))
    saving = bool(unfinished(workdir) - old)
    in_a_save += saving
    newest = (checkpoint_steps(workdir) or [0])[-1]
    if match:  # otherwise the record is still that of the life before
      # while a save is under way, training is already in the interval behind it
      # (a save that the life before began may have been begun again, under the same name)
      assert last_step(workdir) - newest <= INTERVAL * (1 + bool(unfinished(workdir)))
    assert newest < STEPS, 'the run ended before its last kill, so this test shows less'

  assert resumed == sorted(resumed)
  assert resumed[-1] > 2 * INTERVAL
  assert 3 <= in_a_save <= KILLS - in_the_start, 'the kills miss the saves, or everything else'

  result = program.run(workdir, *ARGUMENTS)
  assert result.code == 0, result.err
  assert lines(workdir) == lines(straight)
  assert bits(restore(workdir)) == bits(restore(straight))
