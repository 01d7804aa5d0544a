"""Balancing ideas against numbers computed elsewhere in float64 (golden/balance.npz).

The file holds logits [3 sequences, 40 tokens, 16 experts], top_k, and each idea's value with a
weight of 1. Expert level: softmax scores, per sequence. Sequence-wise: sigmoid scores. The bias
step and MaxVio count the top-k over all sequences together.
"""

# B sequences  S tokens  E experts  K experts a token

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.route import scores
from moe_jax.routing import Gate, choose, default_fields, ideas
from moe_jax.routing.base import selected
from moe_jax.routing.expert_level import ExpertLevel
from moe_jax.routing.loss_free import LossFree
from moe_jax.routing.sequence_wise import SequenceWise
from moe_jax.routing.z_loss import ZLoss
from moe_jax.train.step import router_metrics

# float32 sums of 40 terms near 1
RTOL = 1e-6


@pytest.fixture(scope='module')
def golden():
  with np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'balance.npz') as file:
    return dict(file)


def make_gate(golden, kind, *, bias_E=0.0):
  logits_BSE = jnp.asarray(golden['logits'], jnp.float32)
  score_BSE = scores(logits_BSE, kind)
  _, expert_BSK = jax.lax.top_k(score_BSE + bias_E, int(golden['top_k']))
  return Gate(logits_BSE, score_BSE, expert_BSK, jnp.ones(logits_BSE.shape[:2], bool))


def padded(gate: Gate, rows: int) -> Gate:
  """The same gate with `rows` tokens of padding behind, full of strange numbers."""

  def pad(a, fill):
    extra = jnp.full((a.shape[0], rows, *a.shape[2:]), fill, a.dtype)
    return jnp.concatenate([a, extra], axis=1)

  fills = Gate(50.0, 0.9, 3, False)
  return Gate(*(pad(a, fill) for a, fill in zip(gate, fills, strict=True)))


CLOSED_FORMS = pytest.mark.parametrize(
  ('idea', 'kind', 'name'),
  [
    (ExpertLevel(weight=1.0), 'softmax', 'deepseek_expert_level'),
    (SequenceWise(weight=1.0), 'sigmoid', 'v3_sequence_wise'),
    (ZLoss(weight=1.0), 'softmax', 'z_loss'),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)


@CLOSED_FORMS
def test_loss_equals_the_golden_value(golden, idea, kind, name):
  np.testing.assert_allclose(idea.loss(make_gate(golden, kind)), golden[name], rtol=RTOL)


@CLOSED_FORMS
def test_loss_is_proportional_to_its_weight(golden, idea, kind, name):
  gate = make_gate(golden, kind)
  np.testing.assert_allclose(type(idea)(weight=0.25).loss(gate), 0.25 * golden[name], rtol=RTOL)


@CLOSED_FORMS
def test_padding_adds_nothing_to_the_loss(golden, idea, kind, name):
  gate = padded(make_gate(golden, kind), rows=9)
  np.testing.assert_allclose(idea.loss(gate), golden[name], rtol=RTOL)


@CLOSED_FORMS
def test_padding_alone_is_a_finite_loss_with_a_finite_gradient(golden, idea, kind, name):
  gate = make_gate(golden, kind)._replace(valid_BS=jnp.zeros(golden['logits'].shape[:2], bool))
  run = lambda score, logits: idea.loss(gate._replace(score_BSE=score, logits_BSE=logits))
  loss, grads = jax.value_and_grad(run, argnums=(0, 1))(gate.score_BSE, gate.logits_BSE)
  assert loss == 0
  for grad in grads:
    np.testing.assert_array_equal(grad, 0)


@CLOSED_FORMS
def test_losses_of_micro_batches_average_to_that_of_the_batch(golden, idea, kind, name):
  gate = make_gate(golden, kind)
  rows = [idea.loss(Gate(*(a[i : i + 1] for a in gate))) for i in range(3)]
  np.testing.assert_allclose(np.mean(rows), golden[name], rtol=RTOL)


def test_sequence_wise_counts_without_the_bias_and_expert_level_with_it(golden):
  bias_E = jnp.zeros(16).at[0].set(100.0)
  plain, biased = (make_gate(golden, 'sigmoid', bias_E=b) for b in (0.0, bias_E))
  for idea, differs in ((SequenceWise(), False), (ExpertLevel(), True)):
    assert (idea.loss(plain) != idea.loss(biased)) == differs


def test_balance_losses_push_down_the_scores_of_crowded_experts(golden):
  gate = make_gate(golden, 'softmax')
  loss = lambda score: ExpertLevel(weight=1.0).loss(gate._replace(score_BSE=score))
  grad_E = jax.grad(loss)(gate.score_BSE).sum((0, 1))
  load_E = selected(gate.expert_BSK, 16).sum((0, 1))
  assert np.corrcoef(grad_E, load_E)[0, 1] > 0.999


def load_of(golden):
  return selected(make_gate(golden, 'sigmoid').expert_BSK, 16).sum((0, 1))


def test_loss_free_step_equals_the_golden_step(golden):
  bias_LE = jnp.full((2, 16), 0.5)
  load_LE = jnp.stack([load_of(golden), jnp.full(16, 30.0)])
  new_LE = LossFree(rate=1e-3).update_bias(bias_LE, load_LE)
  # the bias of 0.5 costs 2^-25
  np.testing.assert_allclose(new_LE[0] - 0.5, golden['v3_bias_step_rate_1e3'], atol=3e-8)
  np.testing.assert_array_equal(new_LE[1], 0.5)


def test_loss_free_has_no_loss_and_losses_leave_the_bias_alone(golden):
  gate = make_gate(golden, 'sigmoid')
  assert LossFree().loss(gate) == 0
  bias_LE = jnp.arange(32.0).reshape(2, 16)
  for idea in (ExpertLevel(), SequenceWise(), ZLoss()):
    np.testing.assert_array_equal(idea.update_bias(bias_LE, bias_LE), bias_LE)


def test_max_violation_equals_the_golden_value(golden):
  load_LE = load_of(golden)[None]
  metrics = router_metrics(load_LE, jnp.ones(1), jnp.zeros((1, 16)))
  np.testing.assert_allclose(metrics['router/max_vio'][0], golden['max_violation'], rtol=RTOL)


def test_router_metrics_of_known_loads():
  load_LE = jnp.array([[4.0, 0, 0, 0], [1, 1, 1, 1]])
  bias_LE = jnp.array([[3.0, 4.0, 0, 0], [0, 0, 0, 0]])
  metrics = router_metrics(load_LE, jnp.array([0.5, 1.0]), bias_LE)
  expected = {
    'router/max_vio': [3, 0],
    'router/load_entropy': [0, 1],
    'router/entropy': [0.5, 1],
    'router/dead_experts': [3, 0],
    'router/bias_norm': [5, 0],
    'router/load': [[4, 0, 0, 0], [1, 1, 1, 1]],
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_choose_makes_the_named_ideas_with_their_fields():
  chosen = choose('loss_free+z_loss', {'z_loss': {'weight': 0.5}, 'expert_level': {}})
  assert chosen == (LossFree(), ZLoss(weight=0.5))


def test_choose_none_is_no_idea():
  assert choose('none', default_fields()) == ()


def test_default_fields_name_every_idea_and_build_it():
  assert default_fields().keys() == ideas().keys()
  assert choose('+'.join(ideas()), default_fields()) == tuple(idea() for idea in ideas().values())


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
  ],
)
def test_choose_refuses_in_one_line(balance, fields, message):
  with pytest.raises(ValueError) as error:
    choose(balance, fields)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_a_wrong_field_of_an_unused_idea_is_not_passed_over():
  with pytest.raises(ValueError, match=r'routing\.z_loss\.wait'):
    choose('loss_free', {'z_loss': {'wait': 1.0}})
