"""Where the time of a training step goes, by the model's own names.

  python -m experiments.bench.profile_step --config=experiments/configs/moe_1b.py:synthetic \
      [--config.FIELD=VALUE ...] [--steps=5] [--top=40] [--hlo=FILE]

Prints memory, tokens/s and MFU of the whole step, then device time by operation. XLA's command
buffers, which hide names from the profiler, are off while it runs; that costs under 1%.
"""

import collections
import os
import pathlib
import re
import sys
import tempfile
import warnings

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_gpu_enable_command_buffer='

import jax
from absl import flags as absl_flags

from experiments import flags
from experiments.bench import steps
from experiments.command import Parser
from moe_jax import config_io

# what jax wraps a name in
_WRAPPERS = re.compile(
  r'\b(jit|jvp|transpose|checkpoint|rematted_computation|while|body|closed_call|wrapped|train_step'
  r'|_apply|Decoder|eval_jaxpr)\b[()]*/?'
)


def by_operation(profile: pathlib.Path, hlo: str) -> collections.Counter:
  """Nanoseconds on the device of each (pass, name of the model, kernel) in a trace.

  Args:
    profile: an .xplane.pb of jax.profiler.trace.
    hlo: text of the compiled program, whose metadata name the model's operations.
  """
  names = {}
  for found in re.finditer(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', hlo, re.M):
    names[found.group(1)] = found.group(2)
  spent: collections.Counter = collections.Counter()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    for plane in jax.profiler.ProfileData.from_file(str(profile)).planes:
      if 'GPU' not in plane.name:
        continue
      for line in plane.lines:
        if 'Stream' not in line.name:
          continue
        for event in line.events:
          name = names.get(str(dict(event.stats).get('hlo_op')), '')
          which = 'fwd'
          if 'transpose(' in name:
            which = 'again' if 'rematted' in name else 'bwd'
          short = '/'.join(_WRAPPERS.sub('', name).split('/')[-4:])
          spent[which, short, event.name.split('(')[0]] += event.duration_ns
  return spent


def main(argv: list[str]) -> None:
  parser = Parser('experiments.bench.profile_step', __doc__)
  parser.add_argument('--steps', type=int, default=5, help='that are timed')
  parser.add_argument('--top', type=int, default=40, help='operations that are listed')
  parser.add_argument('--hlo', type=pathlib.Path, help='keeps the compiled program here')
  args, rest = parser.parse_known_args(argv[1:])
  values = absl_flags.FlagValues()
  try:
    raw, _ = flags.parse([argv[0], *rest], values, flags.define(values))
    cfg = config_io.build(raw.to_dict())
  except ValueError as error:
    parser.error(flags.one_line(error))
  step = steps.Step(cfg)
  hlo = step.compiled.as_text() or ''
  if args.hlo:
    args.hlo.write_text(hlo)
  print(step.describe(), flush=True)
  print(step.measure(args.steps).describe(), flush=True)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      step.run(2)
    (profile,) = pathlib.Path(folder).rglob('*.xplane.pb')
    spent = by_operation(profile, hlo)
  total = sum(spent.values())
  print(f'device time {total / 2e6:.2f} ms a step')
  for (which, name, kernel), ns in spent.most_common(args.top):
    print(f'{ns / 2e6:8.2f} ms {ns / total:6.1%}  {which:5}  {name[-64:]:64}  {kernel[:48]}')


if __name__ == '__main__':
  main(sys.argv)
