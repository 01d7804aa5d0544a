"""Where every choice of every token goes."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

# T tokens  K choices a token  R rows  E destinations


class Plan(NamedTuple):
  """Where every choice of every token goes. R is static; some rows may stay unused."""

  choice_R: Int[Array, 'R']  # t * K + k of the choice that fills each row; T * K for unused rows
  row_TK: Int[Array, 'T K']  # the row of each choice; R for a choice that goes nowhere
  size_E: Int[Array, 'E']  # rows of each destination
  offset_E: Int[Array, 'E']  # first row of each destination

  @property
  def token_R(self) -> Int[Array, 'R']:
    """The token that fills each row; T for unused rows."""
    return self.choice_R // self.row_TK.shape[1]

  def by_row(self, a_TK: Float[Array, 'T K']) -> Float[Array, 'R']:
    """A number of each choice, such as its weight, in row order; 0 in unused rows."""
    return a_TK.reshape(-1).at[self.choice_R].get(mode='fill', fill_value=0)

  def by_choice(self, a_R: Float[Array, 'R']) -> Float[Array, 'T K']:
    """The way back; 0 for a choice that goes nowhere."""
    return a_R.at[self.row_TK].get(mode='fill', fill_value=0)
