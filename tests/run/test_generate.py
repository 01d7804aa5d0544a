"""Text from a finished run, by the second program."""

import jax
import pytest

from experiments import generate
from moe_jax import sharding as sh
from moe_jax.infer.decode import generate as generate_ids
from moe_jax.train.state import make_model
from tests.run.program import DEPRECATED, ONE_DEVICE, restore

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(DEPRECATED)]


def files(workdir):
  return {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}


def test_generate_writes_what_the_checkpoint_holds_and_touches_nothing(program, straight, capfd):
  before = files(straight)
  code = generate.main(
    ['generate', f'--workdir={straight}', '--prompt=To be', '--num_tokens=6', '--temperature=0']
  )
  out, err = capfd.readouterr()
  assert (code, err) == (0, '')
  assert files(straight) == before

  state = restore(straight)
  with jax.set_mesh(sh.make_mesh(ONE_DEVICE)):
    ids = generate_ids(
      make_model(program.config()),
      state.variables,
      list(b'To be'),
      num_tokens=6,
      temperature=0.0,
    )
  assert out == f'To be{bytes(i for i in ids if i < 256).decode("utf-8", "replace")}\n'


def test_generate_reads_the_step_that_is_named(straight):
  ask = lambda **options: generate.continue_text(
    str(straight), 'To be', num_tokens=6, temperature=0.0, top_p=1.0, **options
  )
  assert ask(step=12) == ask()
  with pytest.raises(Exception, match='has no checkpoint of step 5'):
    ask(step=5)


def test_speculating_prints_the_greedy_text_and_the_share_of_drafts_accepted(
  program, tmp_path, capfd
):
  result = program.run(tmp_path / 'run', '--config.steps=4', '--config.model.mtp.num_modules=1')
  assert result.code == 0, result

  def text(*flags: str) -> tuple[str, str]:
    own = [f'--workdir={tmp_path / "run"}', '--prompt=To be', '--num_tokens=12', '--temperature=0']
    capfd.readouterr()
    assert generate.main(['program', *own, *flags]) == 0
    return capfd.readouterr()

  greedy, speculative = text(), text('--speculative')
  assert speculative[0] == greedy[0]
  assert speculative[0].startswith('To be')
  assert speculative[1].startswith('drafts accepted: ') and speculative[1].endswith('%\n')
