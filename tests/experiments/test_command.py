"""Small programs say what is wrong in one line, and help with their docstring."""

import pytest

from experiments.command import Parser, one_of


def parse(*arguments):
  parser = Parser('experiments.tool', 'Does one thing.')
  parser.add_argument('--suite', type=one_of(['attention', 'decode']), required=True)
  return parser.parse_known_args(arguments)


@pytest.mark.parametrize(
  ('argument', 'line'),
  [
    (
      '--suite=atention',
      "argument --suite: 'atention' is not one of them. Did you mean attention?",
    ),
    ('--suit=decode', 'arguments are required: --suite. See python -m experiments.tool --help.'),
  ],
)
def test_a_wrong_flag_ends_in_one_line_and_exit_code_2(capsys, argument, line):
  with pytest.raises(SystemExit) as ended:
    parse(argument)
  out, err = capsys.readouterr()
  assert (ended.value.code, out) == (2, '')
  assert err.startswith('error: ') and err.endswith(f'{line}\n') and err.count('\n') == 1


def test_help_is_the_docstring(capsys):
  with pytest.raises(SystemExit) as ended:
    parse('--help')
  assert ended.value.code == 0
  assert 'Does one thing.' in capsys.readouterr().out
