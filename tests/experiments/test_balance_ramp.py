# L layers  E experts

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.balance.dialled import STRENGTHS, Dialled
from experiments.balance.ramp import FLAT, STAIR, configure
from moe_jax.optim import schedule
from moe_jax.routing import Idea, Seen, Sizes, ideas
from moe_jax.routing.expert_level import ExpertLevel
from moe_jax.routing.loss_free import LossFree
from moe_jax.routing.smebu import Smebu
from tests.routing.gates import make_gate

IDEAS: dict[str, Idea] = {
  'none': Idea(),
  'loss-free 1e-2': LossFree(rate=1e-2),
  'loss-free 1e-3': LossFree(rate=1e-3),
  'proportional 1e-2': LossFree(rate=1e-2, rule='proportional'),
  'aux 1e-3': ExpertLevel(weight=1e-3),
  'aux 1e-2': ExpertLevel(weight=1e-2),
  'SMEBU 1e-2': Smebu(rate=1e-2),
}


@pytest.mark.parametrize('method', STRENGTHS)
def test_dials_in_the_state_do_what_the_idea_with_these_constants_does(method):
  gate, sizes = (
    make_gate(np.random.default_rng(0).normal(size=(2, 9, 6)), 'sigmoid', 2),
    Sizes(6, 2, 8, 7),
  )
  dials = Dialled().init(jax.random.key(0), sizes) | STRENGTHS[method]
  dials = {name: jnp.asarray(value) for name, value in dials.items()}
  idea = IDEAS[method]
  np.testing.assert_allclose(Dialled().loss(gate, dials), idea.loss(gate, {}), rtol=1e-6)
  seen, bias_LE = Seen(gate.load_E[None], {}, 2), jnp.full((1, 6), 0.5)
  stacked = {name: value[None] for name, value in dials.items()}
  plain = {name: value[None] for name, value in idea.init(jax.random.key(0), sizes).items()}
  for _ in range(2):  # momentum is there from the second step on
    stacked, plain = Dialled().update(stacked, seen), idea.update(plain, seen)
    want_LE = idea.update_bias(bias_LE, plain, seen)
    np.testing.assert_allclose(Dialled().update_bias(bias_LE, stacked, seen), want_LE, rtol=1e-6)


def test_learning_rate_stays_flat_and_then_climbs_by_stairs(monkeypatch):
  monkeypatch.setattr(Dialled, 'name', '')  # as it was, afterwards
  cfg = configure('ramp', {})
  at_N = jnp.arange(cfg.optim.warmup_steps, cfg.steps)
  rate_N = np.asarray(jax.vmap(schedule(cfg.optim, cfg.steps))(at_N))
  steps = rate_N[1:] / rate_N[:-1]
  assert (steps[: round(FLAT * cfg.steps) - cfg.optim.warmup_steps - 1] == 1).all()
  np.testing.assert_allclose(steps[steps > 1], STAIR, rtol=1e-5)
  assert rate_N[-1] / rate_N[0] == pytest.approx(STAIR**20, rel=1e-4)


def test_importing_the_ramp_adds_no_idea_to_the_others():
  assert 'dialled' not in ideas()
