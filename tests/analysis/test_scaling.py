"""A law that made the losses is found again; what cannot be fitted is refused."""

import numpy as np
import pytest

from moe_jax.analysis.scaling import Law, best_size, fit_law, parabola_minimum
from moe_jax.analysis.scaling_figures import Runs, isoflop_figure

TRUE = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)  # Chinchilla's own


def made_runs(noise, *, seed=0, law=TRUE):
  """Six sizes at five budgets; FLOPs are 6 N D."""
  size, budget = np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e18, 1e20, 5))
  params, budget = size.ravel(), budget.ravel()
  tokens = budget / (6 * params)
  errors = np.random.default_rng(seed).standard_normal(len(params))
  loss = law.loss(params, tokens) * np.exp(noise * errors)
  return Runs(budget, params, tokens, loss, 6 * params)


def test_an_exact_law_is_recovered_exactly():
  runs = made_runs(0)
  fit = fit_law(runs.params_R, runs.tokens_R, runs.loss_R, num_bootstrap=2)
  # the solver ends at relative changes of 1e-6
  np.testing.assert_allclose(fit.law, TRUE, rtol=1e-4)


@pytest.mark.parametrize('law', [TRUE, Law(0.8, 50.0, 0.2, 3000.0, 0.45)], ids=['first', 'second'])
def test_a_noisy_law_lies_within_its_intervals_as_often_as_they_claim(law):
  inside = {name: 0 for name in ('E', 'alpha', 'beta', 'size_exponent')}
  for seed in range(10):
    runs = made_runs(0.003, seed=seed, law=law)
    fit = fit_law(runs.params_R, runs.tokens_R, runs.loss_R, num_bootstrap=40)
    for name in inside:
      low, high = fit.interval(lambda law, name=name: getattr(law, name), level=0.9)
      inside[name] += low < getattr(law, name) < high
      assert high - low < 0.5
  # binomial with 10 and 0.9: below 7 has a chance of 1.3%
  assert min(inside.values()) >= 7, inside


def test_an_outlier_moves_the_law_little():
  runs = made_runs(0.001)
  runs.loss_R[7] *= 1.3
  fit = fit_law(runs.params_R, runs.tokens_R, runs.loss_R, num_bootstrap=1)
  np.testing.assert_allclose(fit.law.alpha, TRUE.alpha, atol=0.05)
  assert np.argmax(np.abs(fit.residual_R)) == 7


def test_the_best_size_agrees_with_the_closed_form():
  budget, g = 1e19, (TRUE.alpha * TRUE.A / (TRUE.beta * TRUE.B)) ** (1 / (TRUE.alpha + TRUE.beta))
  expected = g * (budget / 6) ** TRUE.size_exponent
  found = best_size(TRUE, np.array([1e6, 1e10]), lambda n: budget / (6 * n))
  np.testing.assert_allclose(found, expected, rtol=0.01)  # the grid's step


def test_parabola_finds_its_minimum_and_refuses_one_outside():
  sizes = np.array([1e6, 2e6, 4e6, 8e6])
  loss = 3 + np.log(sizes / 3e6) ** 2
  np.testing.assert_allclose(parabola_minimum(sizes, loss), 3e6, rtol=1e-6)
  assert parabola_minimum(sizes, 3 + np.log(sizes / 1e9) ** 2) is None
  assert parabola_minimum(sizes[:2], loss[:2]) is None


@pytest.mark.parametrize(
  ('change', 'part'),
  [
    (lambda r: r._replace(loss_R=np.where(np.arange(30) == 3, np.nan, r.loss_R)), 'not finite'),
    (lambda r: Runs(*(a[:5] for a in r)), '5 runs'),
    (lambda r: r._replace(params_R=np.full(30, 1e6)), '1 sizes'),
  ],
  ids=['nan', 'few', 'one_size'],
)
def test_what_determines_no_law_is_refused(change, part):
  runs = change(made_runs(0.01))
  with pytest.raises(ValueError, match=part):
    fit_law(runs.params_R, runs.tokens_R, runs.loss_R)


def test_the_picture_states_its_finding():
  runs = made_runs(0.003)
  fit = fit_law(runs.params_R, runs.tokens_R, runs.loss_R, num_bootstrap=10)
  figure = isoflop_figure(runs, fit, parameters='active parameters')
  title = ' '.join(figure.get_suptitle().split())
  assert title.startswith('With 100 times the FLOPs the best size goes from ')
  assert f'C^{fit.law.size_exponent:.2f}' in title
  assert len(figure.axes[0].lines) == 3 * 5
