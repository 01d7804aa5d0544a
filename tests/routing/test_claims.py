"""What ideas claim of themselves, on arrays of a few numbers."""

# L layers  B sequences  S tokens  D model  E experts  K experts a token  N bins

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.routing import Gate, Seen, Sizes
from moe_jax.routing.default_expert import DefaultExpert
from moe_jax.routing.gshard import GShard
from moe_jax.routing.hash import Hash
from moe_jax.routing.loss_free import LossFree
from moe_jax.routing.phi import POTENTIALS, Phi
from moe_jax.routing.quantile import Quantile, quantile_of
from moe_jax.routing.relu import Relu
from moe_jax.routing.simbal import SimBal
from moe_jax.routing.sinkhorn import Sinkhorn, sinkhorn_log
from moe_jax.routing.smebu import Smebu
from tests.routing.gates import loss_of, make_gate, padded


def spread_logits(shape=(2, 5, 6)) -> np.ndarray:
  """Every token's logits, evenly spaced between -2 and 2, in an order of its own; none is 0."""
  B, S, E = shape
  return np.random.default_rng(0).permuted(np.tile(np.linspace(-2, 2, E), (B, S, 1)), axis=-1)


def skewed_logits(shape=(1, 512, 8)) -> np.ndarray:
  """Noise, and a slope that crowds the last experts."""
  return np.random.default_rng(0).normal(size=shape) + np.linspace(-1, 1, shape[-1])


def crowding(expert_BSK, num_experts: int) -> float:
  """Load of the fullest expert over the mean load; 1 at balance."""
  load_E = np.bincount(np.asarray(expert_BSK).ravel(), minlength=num_experts)
  return load_E.max() / load_E.mean()


def gate64(logits_BSE, top_k: int = 2) -> Gate:
  """A gate in float64 with softmax scores, the last token of the first sequence padding."""
  score_BSE = jax.nn.softmax(logits_BSE, axis=-1)
  B, S, E = logits_BSE.shape
  valid_BS = jnp.ones((B, S), bool).at[0, -1].set(False)
  expert_BSK = jax.lax.top_k(logits_BSE, top_k)[1]
  empty = jnp.zeros((B, S), jnp.int32), jnp.zeros(E), jnp.zeros((1, E))
  return Gate(logits_BSE, score_BSE, valid_BS, *empty, top_k, expert_BSK)


def one_device():
  """A mesh, for hooks that name the sharding of what they return."""
  return jax.set_mesh(sh.make_mesh((1, 1, 1)))


def assert_is_gradient(grad, function, at, step=1e-5):
  """`grad` against central differences of `function` in every coordinate, in float64."""
  steps = jnp.eye(at.size).reshape(-1, *at.shape) * step
  ahead, behind = (jax.jit(jax.vmap(function))(at + s * steps) for s in (1, -1))
  slope = (ahead - behind) / (2 * step)
  assert grad.dtype == slope.dtype == jnp.float64 and np.abs(grad).max() > 1e-3
  # the error of the differences: their square, and float64's rounding over the step
  np.testing.assert_allclose(grad, slope.reshape(at.shape), rtol=1e-6, atol=1e-9)


def test_quantile_of_a_histogram_is_the_exact_one_within_a_bin():
  margin_ET = np.random.default_rng(0).beta(2, 5, size=(3, 999)) * 2 - 1
  count_EN = np.stack([np.histogram(row, 512, (-1, 1))[0] for row in margin_ET])
  for share in (0.01, 0.5, 0.75, 0.99):
    got_E = quantile_of(jnp.asarray(count_EN, jnp.float32), share)
    want_E = np.quantile(margin_ET, share, axis=-1, method='inverted_cdf')
    np.testing.assert_allclose(got_E, want_E, rtol=0, atol=2 / 512)


def test_quantile_measures_the_margins_to_the_first_score_passed_over():
  gate = make_gate(skewed_logits((2, 20, 8)), 'softmax', 2, bias_E=np.linspace(0, 0.1, 8))
  count_EN = Quantile(num_bins=64).measure(padded(gate, rows=3), {})['margins_EN']
  score_TE = np.asarray(gate.score_BSE).reshape(-1, 8)
  bar_T1 = np.sort(score_TE + np.asarray(gate.bias_E), -1)[:, -3:-2]
  want_EN = [np.histogram(row, 64, (-1, 1))[0] for row in (score_TE - bar_T1).T]
  np.testing.assert_array_equal(count_EN, want_EN)


@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
def test_quantile_balances_a_batch_routed_again_in_few_steps(score):
  idea, bias_LE = Quantile(), jnp.zeros((1, 8))
  gate = make_gate(skewed_logits(), score, 2)
  assert crowding(gate.expert_BSK, 8) > 2
  for _ in range(5):
    seen = Seen(gate.load_E[None], {k: v[None] for k, v in idea.measure(gate, {}).items()}, 2)
    bias_LE = idea.update_bias(bias_LE, {}, seen)
    expert_BSK = jax.lax.top_k(gate.score_BSE + bias_LE[0], 2)[1]
    gate = gate._replace(bias_E=bias_LE[0], expert_BSK=expert_BSK)
  assert crowding(gate.expert_BSK, 8) < 1.1


def test_sinkhorn_plan_has_rows_of_one_and_columns_of_equal_mass():
  gate = padded(make_gate(skewed_logits((2, 24, 8)), 'softmax', 2), rows=5)
  error = {}
  for num in (1, 4, 40):
    plan = np.exp(sinkhorn_log(gate.logits_BSE, gate.valid_BS, num_iterations=num))[:, :24]
    np.testing.assert_allclose(plan.sum(-1), 1, rtol=1e-5)
    error[num] = np.abs(plan.sum(1) / (24 / 8) - 1).max()
  assert error[40] < 1e-4 < error[4] < error[1]


def test_sinkhorn_spreads_skewed_logits():
  gate = make_gate(skewed_logits(), 'softmax', 2)
  expert_BSK, weight_BSK = Sinkhorn().choose(gate, {})
  assert weight_BSK is None and (expert_BSK[..., 0] != expert_BSK[..., 1]).all()
  assert crowding(gate.expert_BSK, 8) > 2 and crowding(expert_BSK, 8) < 1.2


@pytest.mark.parametrize('potential', POTENTIALS)
def test_phi_presses_on_what_the_average_says_is_crowded(potential):
  # this batch crowds the last experts; the average says that the first is crowded
  gate = make_gate(skewed_logits((1, 64, 4)), 'softmax', 2)
  idea = Phi(weight=1.0, potential=potential)
  grad = jax.grad(lambda x, mean_E: idea.loss(gate._replace(logits_BSE=x), {'mean_E': mean_E}))
  pressed_E = grad(gate.logits_BSE, jnp.array([0.7, 0.1, 0.1, 0.1])).sum((0, 1))
  assert pressed_E[0] > 0 and (pressed_E[1:] < 0).all()
  np.testing.assert_allclose(grad(gate.logits_BSE, jnp.full(4, 0.25)), 0, atol=1e-8)


@pytest.mark.parametrize('potential', POTENTIALS)
def test_gradient_of_phi_equals_finite_differences(potential):
  idea, mean_E = Phi(weight=1.0, potential=potential), np.array([0.4, 0.1, 0.2, 0.1, 0.1, 0.1])
  with jax.enable_x64(True):
    loss = lambda x: idea.loss(gate64(x), {'mean_E': jnp.asarray(mean_E)})
    x_BSE = jnp.asarray(spread_logits())
    assert_is_gradient(jax.grad(loss)(x_BSE), loss, x_BSE)


def test_phi_averages_the_mean_softmax_of_valid_tokens():
  gate = make_gate(skewed_logits((2, 20, 4)), 'softmax', 2)
  idea, sizes = Phi(decay=0.75), Sizes(4, 2, 8, 7)
  sums = {k: v[None] for k, v in idea.measure(padded(gate, rows=3), {}).items()}
  state = {k: v[None] for k, v in idea.init(jax.random.key(0), sizes).items()}
  mean_LE = idea.update(state, Seen(gate.load_E[None], sums, 2))['mean_E']
  want_E = 0.75 * 0.25 + 0.25 * np.asarray(gate.score_BSE).mean((0, 1))
  np.testing.assert_allclose(mean_LE[0], want_E, rtol=1e-5)


def test_gradient_of_gshard_equals_finite_differences():
  with jax.enable_x64(True):
    # steps of 1e-5 change no first expert: logits are 0.8 apart
    loss = lambda x: loss_of(GShard(weight=10.0), gate64(x))
    x_BSE = jnp.asarray(spread_logits())
    assert_is_gradient(jax.grad(loss)(x_BSE), loss, x_BSE)


def test_gradients_of_relu_equal_finite_differences():
  with jax.enable_x64(True):
    direction_BSK = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 4)))
    loss = lambda x: Relu().loss(gate64(x), {'lambda': jnp.asarray(1.0)})
    weights = lambda x: (Relu().choose(gate64(x), {})[1] * direction_BSK).sum()
    for function in (loss, weights):
      x_BSE = jnp.asarray(spread_logits())
      assert_is_gradient(jax.grad(function)(x_BSE), function, x_BSE)


def test_relu_presses_harder_on_crowded_experts():
  gate = make_gate(skewed_logits((1, 64, 4)), 'softmax', 2)
  loss = lambda x: Relu().loss(gate._replace(logits_BSE=x), {'lambda': jnp.asarray(1.0)})
  grad_SE = np.asarray(jax.grad(loss)(gate.logits_BSE))[0]
  active_SE = np.asarray(gate.logits_BSE)[0] > 0
  # E / (K T) for each active token, over T
  want_SE = active_SE * (4 / (2 * 64)) * active_SE.sum(0) / 64
  np.testing.assert_allclose(grad_SE, want_SE, rtol=1e-5)


def test_relu_sparsity_converges_to_its_target():
  # logits that are drawn back to where all 8 experts are active, as a task might
  idea, home_BSE = Relu(), jnp.asarray(1 + np.random.default_rng(0).uniform(size=(1, 64, 8)))
  gate = make_gate(home_BSE, 'softmax', 2)

  def step(carry, _):
    x_BSE, state = carry
    now = gate._replace(logits_BSE=x_BSE)
    pull = lambda x: ((x - home_BSE) ** 2).sum() / 2
    loss = lambda x: pull(x) + idea.loss(now._replace(logits_BSE=x), state)
    sums = {k: v[None] for k, v in idea.measure(now, state).items()}
    state = idea.update(state, Seen(now.load_E[None], sums, now.top_k))
    return (x_BSE - 0.3 * jax.grad(loss)(x_BSE), state), sums['active'][0] / sums['tokens'][0]

  start = (gate.logits_BSE, idea.init(jax.random.key(0), Sizes(8, 2, 8, 7)))
  _, active = jax.jit(lambda carry: jax.lax.scan(step, carry, length=400))(start)
  assert active[0] == 8
  np.testing.assert_allclose(active[-100:].mean(), 2, atol=0.5)


def test_simbal_drives_the_router_towards_orthonormal_columns():
  gate = make_gate(np.zeros((1, 2, 4)), 'softmax', 2)
  loss = lambda router_DE: loss_of(SimBal(weight=1.0), gate._replace(router_DE=router_DE))
  # an absolute value's gradient does not shrink, so the steps do
  step = lambda r, rate: (r - rate * jax.grad(loss)(r), None)
  start_DE, rates = gate.router_DE, jnp.geomspace(0.03, 1e-4, 300)
  end_DE, _ = jax.jit(lambda r: jax.lax.scan(step, r, rates))(start_DE)
  assert loss(start_DE) > 5
  np.testing.assert_allclose(end_DE.T @ end_DE, np.eye(4), atol=0.01)


def test_default_expert_gives_the_router_a_gradient_from_every_expert():
  idea, rng = DefaultExpert(), np.random.default_rng(1)
  with jax.enable_x64(True):
    # 6 experts, 2 chosen, and one token of one sequence
    x_BSE, cotangent_D = jnp.asarray(spread_logits((1, 1, 6))), jnp.asarray(rng.normal(size=3))
    default_ED = jnp.asarray(rng.normal(size=(6, 3)))
    filled = lambda x, d: (idea.fill(gate64(x), {'default_ED': d}) * cotangent_D).sum()
    grad_BSE = jax.grad(filled)(x_BSE, default_ED)
    assert_is_gradient(grad_BSE, lambda x: filled(x, default_ED), x_BSE)
    assert (np.abs(grad_BSE) > 1e-4).all()
    # and what an expert answers on average moves it, if it is not chosen
    moves_BSEED = jax.jacobian(jax.grad(filled), argnums=1)(x_BSE, default_ED)
    moved_E = np.abs(moves_BSEED[0, 0]).max((0, 2)) > 1e-4
    np.testing.assert_array_equal(moved_E, gate64(x_BSE).selected_BSE[0, 0] == 0)


def test_default_expert_average_follows_the_outputs_of_valid_tokens():
  idea, rng = DefaultExpert(decay=0.75), np.random.default_rng(1)
  gate = padded(make_gate(skewed_logits((2, 9, 4)), 'softmax', 2), rows=2)
  # no token visits expert 0
  gate = gate._replace(expert_BSK=jnp.maximum(gate.expert_BSK, 1))
  output_BSKD = rng.normal(size=(2, 11, 2, 3)).astype(np.float32)
  chosen_BSK = np.asarray(gate.expert_BSK)
  mean_ED = np.zeros((4, 3))
  for e in range(1, 4):
    mean_ED[e] = output_BSKD[:, :9][chosen_BSK[:, :9] == e].mean(0)
  with one_device():
    sums = idea.measure(gate._replace(output_BSKD=jnp.asarray(output_BSKD)), {})
  seen = Seen(gate.load_E[None], {k: np.asarray(v)[None] for k, v in sums.items()}, 2)
  state = {'default_ED': jnp.ones((1, 4, 3))}
  for steps in (1, 2):
    state = idea.update(state, seen)
    left = np.where(np.arange(4) == 0, 1, 0.75**steps)[:, None]
    np.testing.assert_allclose(state['default_ED'][0], left + (1 - left) * mean_ED, rtol=1e-5)


def test_hash_depends_on_neither_logits_nor_steps():
  gate = make_gate(skewed_logits((2, 9, 4)), 'softmax', 2)
  state = Hash().init(jax.random.key(0), Sizes(4, 2, 8, 7))
  with one_device():
    chosen_BSK = Hash().choose(gate, state)[0]
  stepped = Hash().update(state, Seen(gate.load_E[None], {}, 2))
  moved = gate._replace(logits_BSE=-gate.logits_BSE, score_BSE=1 - gate.score_BSE, bias_E=9.0)
  with one_device():
    np.testing.assert_array_equal(Hash().choose(moved, stepped)[0], chosen_BSK)


def test_smebu_comes_to_rest_where_the_sign_rule_goes_on_jumping():
  # loads that rise with the bias and are equal at `balanced_LE`
  balanced_LE = np.array([[0.0113, -0.0042, -0.0071]])
  steps = {}
  for idea in (Smebu(rate=5e-4), LossFree(rate=5e-4)):
    bias_LE, state = jnp.zeros((1, 3)), {'momentum_E': jnp.zeros((1, 3))}
    for _ in range(150):
      seen = Seen(30 * (1 + 100 * (bias_LE - balanced_LE)), {}, 2)
      state = idea.update(state, seen)
      before_LE, bias_LE = bias_LE, idea.update_bias(bias_LE, state, seen)
    # what all biases share chooses nothing
    np.testing.assert_allclose(bias_LE - bias_LE.mean(), balanced_LE, atol=1e-3)
    steps[idea.name] = np.abs(bias_LE - before_LE).max()
  assert steps['smebu'] < 1e-6 and steps['loss_free'] > 4e-4
