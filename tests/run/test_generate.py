"""experiments.generate writes one text, whichever way it decodes."""

import pytest

from experiments import generate


@pytest.mark.slow
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
