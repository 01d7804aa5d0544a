"""Balancing ideas against numbers computed elsewhere in float64 (golden/balance.npz).

The file holds logits [3 sequences, 40 tokens, 16 experts], top_k, and each idea's value with a
weight of 1. Switch and the z-loss: the batch. Expert, device and communication level: softmax
scores, per sequence. Sequence-wise: sigmoid scores. The bias step and MaxVio count the top-k over
all sequences together.
"""

# L layers  B sequences  S tokens  E experts  K experts a token

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.routing import Balance, Seen, choose, default_fields, ideas
from moe_jax.routing.communication import Communication
from moe_jax.routing.device_level import DeviceLevel
from moe_jax.routing.expert_level import ExpertLevel
from moe_jax.routing.global_batch import GlobalBatch
from moe_jax.routing.gshard import GShard
from moe_jax.routing.loss_free import LossFree
from moe_jax.routing.sequence_wise import SequenceWise
from moe_jax.routing.simbal import SimBal
from moe_jax.routing.smebu import Smebu
from moe_jax.routing.switch import Switch
from moe_jax.routing.z_loss import ZLoss
from tests.routing.gates import loss_of, make_gate, padded, part, read_golden

RTOL = 1e-6  # float32 sums of 40 terms near 1
MOE = MoEConfig(num_experts=16, top_k=4)


@pytest.fixture(scope='module')
def golden():
  return read_golden()


def gate_of(golden, kind, **kwargs):
  return make_gate(golden['logits'], kind, int(golden['top_k']), **kwargs)


CLOSED_FORMS = pytest.mark.parametrize(
  ('idea', 'kind', 'name'),
  [
    (Switch(weight=1.0), 'softmax', 'switch_batch'),
    (GlobalBatch(weight=1.0), 'softmax', 'switch_batch'),
    (ExpertLevel(weight=1.0), 'softmax', 'deepseek_expert_level'),
    (DeviceLevel(weight=1.0, num_devices=4), 'softmax', 'deepseek_device_level'),
    (
      Communication(weight=1.0, num_devices=4, device_limit=2),
      'softmax',
      'deepseek_communication',
    ),
    (SequenceWise(weight=1.0), 'sigmoid', 'v3_sequence_wise'),
    (ZLoss(weight=1.0), 'softmax', 'z_loss'),
  ],
  ids=lambda value: value if isinstance(value, str) else getattr(value, 'name', ''),
)


@CLOSED_FORMS
def test_loss_equals_the_golden_value(golden, idea, kind, name):
  np.testing.assert_allclose(loss_of(idea, gate_of(golden, kind)), golden[name], rtol=RTOL)


@CLOSED_FORMS
def test_loss_is_proportional_to_its_weight(golden, idea, kind, name):
  quarter = type(idea)(**{**vars(idea), 'weight': 0.25})
  np.testing.assert_allclose(
    loss_of(quarter, gate_of(golden, kind)), 0.25 * golden[name], rtol=RTOL
  )


@CLOSED_FORMS
def test_padding_adds_nothing_to_the_loss(golden, idea, kind, name):
  gate = padded(gate_of(golden, kind), rows=9)
  np.testing.assert_allclose(loss_of(idea, gate), golden[name], rtol=RTOL)


@CLOSED_FORMS
def test_padding_alone_is_a_finite_loss_with_a_finite_gradient(golden, idea, kind, name):
  gate = gate_of(golden, kind)
  gate = gate._replace(valid_BS=jnp.zeros_like(gate.valid_BS))
  run = lambda score, logits: loss_of(idea, gate._replace(score_BSE=score, logits_BSE=logits))
  loss, grads = jax.value_and_grad(run, argnums=(0, 1))(gate.score_BSE, gate.logits_BSE)
  assert loss == 0
  for grad in grads:
    np.testing.assert_array_equal(grad, 0)


@CLOSED_FORMS
def test_losses_of_micro_batches_average_to_that_of_the_batch(golden, idea, kind, name):
  gate = gate_of(golden, kind)
  rows = [loss_of(idea, part(gate, slice(i, i + 1)), whole=gate) for i in range(3)]
  np.testing.assert_allclose(np.mean(rows), golden[name], rtol=RTOL)


@CLOSED_FORMS
def test_gradient_equals_finite_differences(idea, kind, name):
  # logits 0.27 apart: steps of 0.01 change no choice
  rng = np.random.default_rng(0)
  logits_BSE = rng.permuted(np.tile(np.linspace(-2, 2, 16), (3, 40, 1)), axis=-1)
  loss = lambda logits_BSE: loss_of(idea, make_gate(logits_BSE, kind, 4))
  direction, step = rng.normal(size=logits_BSE.shape), 1e-2
  slope = (jax.grad(loss)(jnp.asarray(logits_BSE, jnp.float32)) * direction).sum()
  ahead, behind = (loss(logits_BSE + s * step * direction) for s in (1, -1))
  # the difference of two float32 numbers, over twice the step
  noise = 4e-7 * float(ahead) / step
  np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=2e-3, atol=noise)


def test_global_batch_differs_from_the_average_over_sequences_by_what_experts_may_specialise():
  # two sequences, each of which uses half of the experts: balanced together, not apart
  logits_BSE = np.full((2, 8, 4), -4.0)
  logits_BSE[0, :, :2], logits_BSE[1, :, 2:] = 4.0, 4.0
  gate = make_gate(logits_BSE, 'softmax', 2)
  np.testing.assert_allclose(loss_of(GlobalBatch(weight=1.0), gate), 1.0, rtol=1e-6)
  assert loss_of(ExpertLevel(weight=1.0), gate) > 1.9


def test_switch_is_one_and_gshard_one_over_e_squared_for_uniform_routing():
  tokens = np.arange(16) % 4
  gate = make_gate(1e-4 * np.eye(4)[tokens][None], 'softmax', 2)
  even = gate._replace(expert_BSK=jnp.stack([tokens, (tokens + 1) % 4], -1)[None])
  np.testing.assert_allclose(loss_of(Switch(weight=1.0), even), 1.0, rtol=1e-4)
  np.testing.assert_allclose(loss_of(GShard(weight=1.0), even), 1 / 16, rtol=1e-4)


def test_gshard_equals_its_definition(golden):
  gate = make_gate(golden['logits'], 'softmax', 2)
  p_TE = np.exp(golden['logits']).reshape(-1, 16)
  p_TE /= p_TE.sum(-1, keepdims=True)
  first_E = np.bincount(p_TE.argmax(-1), minlength=16)
  want = (first_E / len(p_TE) * p_TE.mean(0)).mean()
  np.testing.assert_allclose(loss_of(GShard(weight=1.0), gate), want, rtol=RTOL)


def test_gshard_visits_the_second_expert_as_often_as_twice_its_weight(golden):
  logits_BSE = np.random.default_rng(0).normal(size=(8, 2000, 4))
  gate = make_gate(logits_BSE, 'softmax', 2)
  kept = np.asarray(GShard().limit(gate, {})[..., 1] < 4)
  p_BSK = np.take_along_axis(np.asarray(gate.score_BSE), np.asarray(gate.expert_BSK), -1)
  share = np.minimum(1, 2 * p_BSK[..., 1] / p_BSK.sum(-1))
  # 16000 draws deviate by at most 0.5 / sqrt(16000) = 0.004; five of these
  np.testing.assert_allclose(kept.mean(), share.mean(), atol=0.02)
  for low, high in ((0.2, 0.4), (0.6, 0.8)):
    inside = (share > low) & (share < high)
    np.testing.assert_allclose(kept[inside].mean(), share[inside].mean(), atol=0.04)


def test_simbal_equals_its_definition_and_vanishes_for_an_orthonormal_router():
  gate = make_gate(np.zeros((1, 2, 8)), 'softmax', 2)
  router_DE = np.asarray(gate.router_DE, np.float64)
  want = np.abs(router_DE.T @ router_DE - np.eye(8)).sum()
  np.testing.assert_allclose(loss_of(SimBal(weight=1.0), gate), want, rtol=1e-5)
  q_DE = jnp.asarray(np.linalg.qr(router_DE)[0])
  assert loss_of(SimBal(weight=1.0), gate._replace(router_DE=q_DE)) < 1e-4
  grad_DE = jax.grad(lambda r: loss_of(SimBal(weight=1.0), gate._replace(router_DE=r)))
  sign_EE = np.sign(router_DE.T @ router_DE - np.eye(8))
  np.testing.assert_allclose(grad_DE(gate.router_DE), 2 * router_DE @ sign_EE, rtol=1e-4)


def test_sequence_wise_counts_without_the_bias_and_expert_level_with_it(golden):
  bias_E = jnp.zeros(16).at[0].set(100.0)
  plain, biased = (gate_of(golden, 'sigmoid', bias_E=b) for b in (0.0, bias_E))
  for idea, differs in ((SequenceWise(), False), (ExpertLevel(), True)):
    assert (loss_of(idea, plain) != loss_of(idea, biased)) == differs


@pytest.mark.parametrize(
  'idea',
  [ExpertLevel(), DeviceLevel(), Communication(), SequenceWise(), GlobalBatch()],
  ids=lambda idea: idea.name,
)
def test_sigmoid_scores_that_all_shrink_together_lower_no_loss(golden, idea):
  gate = gate_of(golden, 'sigmoid')
  shrunk = gate._replace(score_BSE=gate.score_BSE / 8)
  np.testing.assert_allclose(loss_of(idea, shrunk), loss_of(idea, gate), rtol=RTOL)


@pytest.mark.parametrize('idea', [ExpertLevel(weight=1.0), GlobalBatch(weight=1.0)])
def test_balance_losses_push_down_the_scores_of_crowded_experts(golden, idea):
  gate = gate_of(golden, 'softmax')
  loss = lambda score: loss_of(idea, gate._replace(score_BSE=score))
  grad_E = jax.grad(loss)(gate.score_BSE).sum((0, 1))
  assert np.corrcoef(grad_E, gate.load_E)[0, 1] > 0.9


def seen(load_LE, **sums) -> Seen:
  return Seen(jnp.asarray(load_LE, jnp.float32), sums, top_k=4)


@pytest.mark.parametrize(
  ('progress', 'share'), [(0.0, 1), (0.5, 1), (0.75, 0.5), (1.0, 0), (1.5, 0)]
)
def test_loss_free_rate_falls_to_zero_from_decay_from_on(progress, share):
  load_LE = jnp.array([[1.0, 2.0, 3.0]])
  idea = LossFree(rate=1e-2, decay_from=0.5)
  new_LE = idea.update_bias(jnp.zeros((1, 3)), {}, Seen(load_LE, {}, 1, progress))
  np.testing.assert_allclose(new_LE, [[1e-2 * share, 0, -1e-2 * share]], rtol=1e-5)


@pytest.mark.parametrize('progress', [0.0, 1.0, 1.5])
def test_loss_free_rate_is_constant_unless_asked(progress):
  seen = Seen(jnp.array([[1.0, 2.0, 3.0]]), {}, 1, progress)
  new_LE = LossFree(rate=1e-2).update_bias(jnp.zeros((1, 3)), {}, seen)
  np.testing.assert_allclose(new_LE, [[1e-2, 0, -1e-2]], rtol=1e-6)


def test_loss_free_step_equals_the_golden_step(golden):
  bias_LE = jnp.full((2, 16), 0.5)
  load_E = gate_of(golden, 'sigmoid').load_E
  load_LE = jnp.stack([load_E, jnp.full(16, 30.0)])
  new_LE = LossFree(rate=1e-3).update_bias(bias_LE, {}, seen(load_LE))
  # the bias of 0.5 costs 2^-25
  np.testing.assert_allclose(new_LE[0] - 0.5, golden['v3_bias_step_rate_1e3'], atol=3e-8)
  np.testing.assert_array_equal(new_LE[1], 0.5)


def test_the_proportional_rule_steps_by_the_relative_error():
  new_LE = LossFree(rate=0.1, rule='proportional').update_bias(
    jnp.zeros((1, 4)), {}, seen([[4.0, 8, 8, 12]])
  )
  np.testing.assert_allclose(new_LE, [[0.05, 0, 0, -0.05]], atol=1e-7)


def test_smebu_steps_by_its_formula_and_stands_still_at_balance():
  idea = Smebu(rate=5e-4, kappa=2.0, beta=0.5)
  load_LE = np.array([[10.0, 20, 30, 60], [30, 30, 30, 30]])
  v_LE = (30 - load_LE) / 30
  d_LE = 5e-4 * np.tanh(2 * v_LE)
  d_LE -= d_LE.mean(-1, keepdims=True)
  state, bias_LE = {'momentum_E': jnp.zeros((2, 4))}, jnp.zeros((2, 4))
  state = idea.update(state, seen(load_LE))
  bias_LE = idea.update_bias(bias_LE, state, seen(load_LE))
  np.testing.assert_allclose(bias_LE, 0.5 * d_LE, atol=1e-9)
  state = idea.update(state, seen(load_LE))
  bias_LE = idea.update_bias(bias_LE, state, seen(load_LE))
  np.testing.assert_allclose(bias_LE, (0.5 + 0.75) * d_LE, atol=1e-9)
  np.testing.assert_array_equal(bias_LE[1], 0)


def test_ideas_leave_alone_what_is_not_theirs(golden):
  gate = gate_of(golden, 'sigmoid')
  assert loss_of(LossFree(), gate) == 0
  bias_LE = jnp.arange(32.0).reshape(2, 16)
  for idea in (ExpertLevel(), SequenceWise(), ZLoss(), Switch(), SimBal()):
    new_LE = idea.update_bias(bias_LE, {}, seen(bias_LE))
    np.testing.assert_array_equal(new_LE, bias_LE)


def test_choose_makes_the_named_ideas_with_their_fields():
  chosen = choose('loss_free+z_loss', {'z_loss': {'weight': 0.5}, 'expert_level': {}}, MOE)
  assert chosen == Balance((LossFree(), ZLoss(weight=0.5)))


def test_choose_none_is_no_idea():
  assert choose('none', default_fields(), MOE) == Balance()


def test_default_fields_name_every_idea_and_build_it():
  assert default_fields().keys() == ideas().keys()
  for name, idea in ideas().items():
    moe = MoEConfig(num_experts=16, top_k=2)
    assert choose(name, default_fields(), moe) == Balance((idea(),))


@pytest.mark.parametrize(
  ('balance', 'fields', 'message'),
  [
    ('los_free', {}, "'los_free' is not a balancing idea. Did you mean loss_free?"),
    ('', {}, "balance='': '' is not a balancing idea."),
    ('loss_free+nome', {}, 'Did you mean none?'),
    ('z_loss+z_loss', {}, "balance='z_loss+z_loss' names 'z_loss' twice. Name it once."),
    ('none', {'zloss': {}}, 'routing.zloss is not a balancing idea. Did you mean z_loss?'),
    ('z_loss', {'z_loss': {'wait': 1.0}}, 'routing.z_loss.wait is not a field'),
    ('z_loss', {'z_loss': {'weight': 'much'}}, "routing.z_loss.weight='much' must be float"),
    ('hash+relu', {}, "balance='hash+relu': hash and relu both choose."),
    ('smebu+loss_free', {}, 'smebu and loss_free both move the bias.'),
    ('loss_free+sinkhorn', {}, 'the selection bias of loss_free would change nothing'),
    ('gshard', {}, 'gshard is defined for model.moe.top_k=2, not 4'),
    ('device_level', {'device_level': {'num_devices': 3}}, 'num_devices=3 must divide'),
    ('capacity', {'capacity': {'factor': -1.0}}, 'routing.capacity.factor=-1.0 must be positive'),
    ('loss_free', {'loss_free': {'decay_from': 2.0}}, 'decay_from=2.0 must lie in [0, 1]'),
    ('loss_free', {'loss_free': {'rule': 'sgn'}}, "rule='sgn' is not one of sign, proportional"),
  ],
)
def test_choose_refuses_in_one_line(balance, fields, message):
  with pytest.raises(ValueError) as error:
    choose(balance, fields, MOE)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('balance', 'moe', 'message'),
  [
    ('relu', MoEConfig(num_groups=4, top_groups=2), 'relu chooses among all experts'),
    ('quantile', MoEConfig(num_experts=4, top_k=4), 'quantile needs model.moe.top_k=4 below'),
    ('quantile', MoEConfig(score='sqrt_softplus'), 'quantile needs scores in [0, 1]'),
  ],
)
def test_choose_refuses_a_layer_that_an_idea_cannot_serve(balance, moe, message):
  with pytest.raises(ValueError) as error:
    choose(balance, {}, moe)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_a_wrong_field_of_an_unused_idea_is_not_passed_over():
  with pytest.raises(ValueError, match=r'routing\.z_loss\.wait'):
    choose('loss_free', {'z_loss': {'wait': 1.0}}, MOE)
