"""The choice of experts against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.route import gate_logits, keep_top_groups, reference, scores, top_k_route, triton

# T tokens  E experts  K experts a token
T, E = 50, 16
LOGITS = np.random.default_rng(0).normal(size=(T, E)).astype(np.float32)
BIAS = np.random.default_rng(1).normal(size=E).astype(np.float32)
NO_BIAS = jnp.zeros(E)


def loop(score_TE, bias_E, *, k, groups, kept, group_score, normalize, scale):
  """One token at a time, as the papers put it."""
  experts, weights = [], []
  for score_E in score_TE:
    choice_E = (score_E + bias_E).copy()
    if kept < groups:
      parts = choice_E.reshape(groups, -1)
      size = 1 if group_score == 'max' else 2
      group_value = [sorted(part)[::-1][:size] for part in parts]
      best = np.argsort([-sum(v) for v in group_value], kind='stable')[:kept]
      for g in set(range(groups)) - set(best.tolist()):
        parts[g] = -np.inf
    chosen = np.argsort(-choice_E, kind='stable')[:k]
    weight = score_E[chosen]
    experts.append(chosen)
    weights.append(scale * (weight / weight.sum() if normalize else weight))
  return np.array(experts), np.array(weights)


@pytest.mark.parametrize(
  ('kind', 'bias', 'options'),
  [
    ('softmax', False, dict(k=6, num_groups=1, top_groups=1, normalize=False)),
    (
      'softmax',
      False,
      dict(k=3, num_groups=8, top_groups=3, group_score='max', normalize=False, scale=16.0),
    ),
    ('sigmoid', True, dict(k=4, num_groups=4, top_groups=2, group_score='top2', scale=2.5)),
    ('sigmoid', True, dict(k=16, num_groups=1, top_groups=1)),
    ('sigmoid', True, dict(k=1, num_groups=2, top_groups=1, normalize=False)),
  ],
  ids=['v1', 'v2_device_limit', 'v3_node_limit', 'every_expert', 'one_expert'],
)
def test_route_equals_a_loop_over_tokens(kind, bias, options):
  score_TE = scores(LOGITS, kind)
  bias_E = BIAS if bias else np.zeros_like(BIAS)
  expert_TK, weight_TK = jax.jit(lambda s: top_k_route(s, jnp.asarray(bias_E), **options))(score_TE)
  expected, weights = loop(
    np.asarray(score_TE),
    bias_E,
    k=options['k'],
    groups=options['num_groups'],
    kept=options['top_groups'],
    group_score=options.get('group_score', 'top2'),
    normalize=options.get('normalize', True),
    scale=options.get('scale', 1.0),
  )
  np.testing.assert_array_equal(expert_TK, expected)
  np.testing.assert_allclose(weight_TK, weights, rtol=1e-6)


def test_v2_and_v3_groups_differ_where_one_expert_towers_over_its_group():
  # group 0 has the largest single score, group 1 the largest pair
  score_E = jnp.array([0.9, 0.0, 0.6, 0.5])
  limits = dict(num_groups=2, top_groups=1)
  by_max = keep_top_groups(score_E, group_score='max', **limits)
  by_pair = keep_top_groups(score_E, group_score='top2', **limits)
  np.testing.assert_array_equal(np.isfinite(by_max), [1, 1, 0, 0])
  np.testing.assert_array_equal(np.isfinite(by_pair), [0, 0, 1, 1])


def test_route_stays_within_the_kept_groups():
  expert_TK, _ = top_k_route(scores(LOGITS, 'sigmoid'), BIAS, k=4, num_groups=8, top_groups=2)
  groups = [len(set(row)) for row in np.asarray(expert_TK // 2).tolist()]
  assert max(groups) == 2


def test_bias_changes_the_choice_and_not_the_weight():
  score_TE = scores(LOGITS, 'sigmoid')
  plain, _ = top_k_route(score_TE, NO_BIAS, k=1)
  favoured, weight = top_k_route(score_TE, NO_BIAS.at[5].set(100.0), k=1, normalize=False)
  assert (np.asarray(plain) != 5).any()
  assert (np.asarray(favoured) == 5).all()
  np.testing.assert_array_equal(weight[:, 0], score_TE[:, 5])


def test_no_gradient_reaches_the_bias():
  score_TE = scores(LOGITS, 'sigmoid')
  weigh = lambda bias: (top_k_route(score_TE, bias, k=4)[1] ** 2).sum()
  np.testing.assert_array_equal(jax.grad(weigh)(jnp.asarray(BIAS)), 0)


def test_gradient_reaches_the_scores_of_the_chosen_alone():
  score_TE = scores(LOGITS, 'sigmoid')
  expert_TK, _ = top_k_route(score_TE, BIAS, k=4)
  weigh = lambda score: (top_k_route(score, BIAS, k=4)[1] ** 2).sum()
  grad_TE = np.asarray(jax.grad(weigh)(score_TE))
  chosen_TE = np.eye(E)[np.asarray(expert_TK)].sum(1)
  np.testing.assert_array_equal(grad_TE != 0, chosen_TE)


def test_weights_sum_to_the_scale():
  _, weight_TK = top_k_route(scores(LOGITS, 'sigmoid'), BIAS, k=4, scale=2.5)
  np.testing.assert_allclose(weight_TK.sum(-1), 2.5, rtol=1e-6)


def test_scores_that_underflow_do_not_divide_by_zero():
  score_TE = scores(jnp.full((2, E), -200.0), 'sigmoid')
  _, weight_TK = top_k_route(score_TE, NO_BIAS, k=4)
  assert np.isfinite(weight_TK).all()


def test_scores_of_bfloat16_logits_are_float32():
  assert scores(jnp.zeros((2, E), jnp.bfloat16), 'softmax').dtype == jnp.float32


def test_unknown_score_is_refused_with_the_known_ones():
  with pytest.raises(ValueError, match=r"score='relu' is not one of softmax, sigmoid"):
    scores(LOGITS, 'relu')


@pytest.mark.parametrize(
  ('experts', 'options'),
  [
    (256, dict(k=8, num_groups=8, top_groups=4, group_score='top2')),
    (160, dict(k=6, num_groups=8, top_groups=3, group_score='max')),
    (24, dict(k=3, num_groups=1, top_groups=1, group_score='top2')),
  ],
  ids=['v3', 'v2', 'not_a_power_of_two'],
)
def test_triton_chooses_as_the_reference_does_ties_included(experts, options):
  score_TE = jax.random.normal(jax.random.key(0), (41, experts)).at[3].set(1.0)
  bias_E = jax.random.normal(jax.random.key(1), (experts,))
  expected = reference.choose(score_TE, bias_E, **options)
  np.testing.assert_array_equal(triton.choose(score_TE, bias_E, **options), expected)


def test_triton_gives_valid_experts_to_scores_that_are_not_numbers():
  score_TE = jnp.full((2, E), jnp.nan)
  options = dict(k=4, num_groups=4, top_groups=2, group_score='top2')
  expert_TK = np.asarray(triton.choose(score_TE, NO_BIAS, **options))
  assert ((expert_TK >= 0) & (expert_TK < E)).all()


def test_gate_of_bfloat16_tokens_is_a_float32_product_with_its_gradients():
  keys = jax.random.split(jax.random.key(0), 3)
  x_BSD = jax.random.normal(keys[0], (2, 64, 512), jnp.bfloat16)
  router_DE = jax.random.normal(keys[1], (512, 32))
  dlogits_BSE = jax.random.normal(keys[2], (2, 64, 32))
  logits, vjp = jax.vjp(gate_logits, x_BSD, router_DE)
  x, r, d = (np.asarray(a, np.float64) for a in (x_BSD, router_DE, dlogits_BSE))
  # 512 and 128 terms of order 1, summed in float32
  np.testing.assert_allclose(logits, x @ r, atol=512 * 2.0**-22)
  dx, drouter = vjp(dlogits_BSE)
  np.testing.assert_allclose(drouter, np.einsum('bsd,bse->de', x, d), atol=128 * 2.0**-22)
  assert dx.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(dx, np.float64), d @ r.T, rtol=2.0**-8, atol=1e-3)
