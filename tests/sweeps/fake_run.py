"""Stands in for experiments.run: writes what a run writes, in milliseconds a step.

The loss after s of n steps is (1 + |lr_peak - 1e-3| * 100) + 1 / s. A learning rate of 9 fails with
a reason, one of 8 with a traceback; the environment's FAKE_STEP_S is the time of a step.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 10


def main() -> int:
  given = dict(a.removeprefix('--').split('=', 1) for a in sys.argv[1:])
  workdir, lr = Path(given['workdir']), float(given.get('config.optim.lr_peak', 1e-3))
  stopping = []
  signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
  workdir.mkdir(parents=True, exist_ok=True)
  done = workdir / 'step'
  start = int(done.read_text()) if done.exists() else 0
  print('started at', start, flush=True)
  if lr == 9:
    print('error: lr_peak=9 is too much. Lower it.', file=sys.stderr)
    return 2
  if lr == 8:
    raise RuntimeError('a bug')
  loss = 0.0
  with (workdir / 'metrics.jsonl').open('a') as file:
    for step in range(start + 1, STEPS + 1):
      time.sleep(float(os.environ.get('FAKE_STEP_S', '0')))
      loss = 1 + abs(lr - 1e-3) * 100 + 1 / step
      row = {'step': step, 'train/loss': loss, 'router/max_vio': [1 / step, 2 / step]}
      evaluation = {'step': step, 'eval/loss': loss}
      file.write(json.dumps(row) + '\n' + json.dumps(evaluation) + '\n')
      file.flush()
      done.write_text(str(step))
      if stopping and step < STEPS:
        return 0
  summary = {'steps': 12, 'eval': {'loss': loss}, 'tokens': 100, 'parameters': {'total': 7}}
  (workdir / 'summary.json').write_text(json.dumps(summary))
  return 0


if __name__ == '__main__':
  sys.exit(main())
