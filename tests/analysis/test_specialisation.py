"""Specialisation that was put in is found, and luck is not."""

import numpy as np

from moe_jax.analysis import specialisation as sp
from moe_jax.train.metrics import Metrics


def title(figure):
  return ' '.join(figure.get_suptitle().split())


def test_information_of_a_deciding_label_is_its_entropy_and_of_luck_nothing():
  rng = np.random.default_rng(0)
  label_T = rng.integers(0, 4, 4000)
  chosen_LTK = np.stack([label_T, rng.integers(0, 4, 4000)])[..., None]
  found_L = sp.information(chosen_LTK, label_T, 4)
  # 2 bits less the plug-in bias of 9 / (2 * 4000 * ln 2), taken off by the shuffles
  np.testing.assert_allclose(found_L, [2, 0], atol=0.005)


def test_together_is_one_for_independent_experts():
  load_E = np.array([10.0, 20.0, 30.0])
  pairs_EE = np.outer(load_E, load_E) / 100
  np.fill_diagonal(pairs_EE, load_E)
  times_EE = sp.together(pairs_EE[None])[0]
  assert np.isnan(np.diagonal(times_EE)).all()
  np.testing.assert_allclose(times_EE[~np.eye(3, dtype=bool)], 1)


def test_pictures_state_what_they_show():
  load_LGE = np.ones((2, 2, 4)) * 50
  load_LGE[1, :, 3] = [95, 5]
  text = title(sp.domain_figure(load_LGE, ['code', 'plays'], first_layer=1))
  assert text.startswith('95% of the tokens of one expert in layer 2 are code (5')
  pairs_LEE = np.full((1, 4, 4), 10.0) + 90 * np.eye(4)
  pairs_LEE[0, 1, 2] = pairs_LEE[0, 2, 1] = 60
  text = title(sp.coactivation_figure(pairs_LEE, top_k=2))
  assert text.startswith('Experts 1 and 2 of layer 0 meet 3.3 times')
  assert sp.coactivation_figure(pairs_LEE, top_k=1) is None
  rows = [
    {'step': s, 'router/domain_information': [s / 10], 'router/overlap': [0.5 + s / 10]}
    for s in range(3)
  ]
  text = title(sp.growth_figure(Metrics(rows=rows, events=[])))
  assert 'rises from 0.00 to 0.20 bits; choices settle: 50% stay the same at first, 70%' in text


def test_favourites_are_the_tokens_that_prefer_an_expert():
  token_T = np.repeat([7, 8, 9], 20)
  chosen_LTK = np.where(token_T == 8, 1, 0)[None, :, None]
  rows = sp.favourite_tokens(chosen_LTK, token_T, layer=0, num_experts=2, decode=str, num=2)
  assert [(e, words) for e, words, _ in rows] == [(0, "'7'  '9'"), (1, "'8'")]
  assert [share for *_, share in rows] == [1, 1]


def test_information_picture_compares_token_and_domain():
  token_T = np.tile(np.arange(4), 100)
  figure = sp.information_figure(
    token_T[None, :, None], token_T, token_T // 2, num_experts=4, first_layer=3
  )
  assert title(figure).startswith('A choice tells 2.0 times as much of the token as of its domain')
