"""Continues a text: python -m experiments.generate --workdir=FOLDER --prompt=TEXT

Reads the newest good checkpoint and writes nothing, so it may look at a run that is going on.
With --speculative --temperature=0, multi-token prediction drafts; the text is the same, and the
share of drafts that the model accepted goes to stderr.
"""

import sys
from collections.abc import Sequence

import jax
from absl import flags

from experiments.flags import UsageError, one_line, parse_flags
from moe_jax import config_io
from moe_jax import sharding as sh
from moe_jax.config import RunConfig
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.infer.decode import generate
from moe_jax.infer.speculative import speculate
from moe_jax.train import loop
from moe_jax.train.checkpoint import Checkpointer, CheckpointError
from moe_jax.train.state import make_model
from moe_jax.train.workdir import Workdir


def continue_text(
  workdir: str,
  prompt: str,
  *,
  num_tokens: int,
  temperature: float,
  top_p: float,
  seed: int = 0,
  step: int | None = None,
  speculative: bool = False,
) -> tuple[str, float | None]:
  """Returns the text that the model of `workdir` writes behind `prompt`, on one device.

  With it comes the share of drafts that were accepted, where `speculative`; that is greedy
  decoding, whatever `temperature`, `top_p` and `seed`.

  Raises:
    ValueError: the folder holds no run, or `speculative` and its model has nothing to draft with.
    CheckpointError: it holds no good checkpoint.
  """
  folder = Workdir(workdir)
  cfg: RunConfig = config_io.build(folder.read_config())
  tokenizer = load_tokenizer(cfg.data.tokenizer)
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    checkpoints = Checkpointer(folder.checkpoints, keep=cfg.checkpoint.keep)
    restored = checkpoints.restore(loop.state_target(cfg), step=step)
    checkpoints.close()
    if restored is None:
      raise CheckpointError(
        f'{folder.checkpoints} holds no checkpoint yet. Wait for the first, or choose another run.'
      )
    model = make_model(cfg)
    variables = restored.state.variables
    start, stop_id, accepted = (
      tokenizer.encode(prompt) or [tokenizer.eos_id],
      tokenizer.eos_id,
      None,
    )
    if speculative:
      ids, accepted = speculate(model, variables, start, num_tokens, stop_id=stop_id)
    else:
      ids = generate(
        model,
        variables,
        start,
        num_tokens=num_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_id=stop_id,
      )
  text = tokenizer.decode([i for i in ids if i < tokenizer.vocab_size and i != tokenizer.eos_id])
  return text, accepted


def main(argv: Sequence[str]) -> int:
  values = flags.FlagValues()

  def define(kind, name, default, text, **bounds):
    return kind(name, default, text, flag_values=values, **bounds)

  workdir = define(flags.DEFINE_string, 'workdir', None, 'Folder of the run.')
  prompt = define(flags.DEFINE_string, 'prompt', '', 'Text to continue.')
  num_tokens = define(flags.DEFINE_integer, 'num_tokens', 100, 'Tokens to write.', lower_bound=0)
  temperature = define(flags.DEFINE_float, 'temperature', 0.8, '0: always the likeliest.')
  top_p = define(flags.DEFINE_float, 'top_p', 0.95, 'Share of probability to draw from.')
  seed = define(flags.DEFINE_integer, 'seed', 0, 'Another seed writes another text.')
  step = define(flags.DEFINE_integer, 'step', None, 'Checkpoint to read; the newest by default.')
  speculative = define(
    flags.DEFINE_boolean, 'speculative', False, 'Draft by multi-token prediction; temperature 0.'
  )
  if {'--help', '-h'} & set(argv):
    print(__doc__, values.get_help(), sep='\n')
    return 0
  try:
    parse_flags(argv, values)
    if not workdir.value:
      raise UsageError('--workdir is missing. Name the folder of a run, such as runs/quickstart.')
    if temperature.value < 0:
      raise UsageError(f'--temperature={temperature.value} must not be negative.')
    if not 0 < top_p.value <= 1:
      raise UsageError(f'--top_p={top_p.value} must lie in (0, 1]. Use 1 for no cut.')
    if speculative.value and temperature.value != 0:
      raise UsageError(
        f'--speculative writes the likeliest text, not one of --temperature={temperature.value}. '
        'Add --temperature=0.'
      )
    text, accepted = continue_text(
      workdir.value,
      prompt.value or '',
      num_tokens=num_tokens.value,
      temperature=temperature.value,
      top_p=top_p.value,
      seed=seed.value,
      step=step.value,
      speculative=bool(speculative.value),
    )
  except (ValueError, CheckpointError, OSError) as e:
    print(f'error: {one_line(e)}', file=sys.stderr)
    return 2
  print(f'{prompt.value}{text}')
  if accepted is not None:
    print(f'drafts accepted: {accepted:.0%}', file=sys.stderr)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
