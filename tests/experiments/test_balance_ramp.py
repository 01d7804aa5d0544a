# L layers  E experts

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.balance.ramp import FLAT, METHODS, STAIR, Dialled, configure
from moe_jax.optim import schedule
from moe_jax.routing import Idea, Seen, Sizes, ideas
from moe_jax.routing.expert_level import ExpertLevel
from moe_jax.routing.loss_free import LossFree
from tests.routing.gates import make_gate

IDEAS: dict[str, Idea] = {
  'none': Idea(),
  'loss-free 1e-2': LossFree(rate=1e-2),
  'loss-free 1e-3': LossFree(rate=1e-3),
  'proportional 1e-2': LossFree(rate=1e-2, rule='proportional'),
  'aux 1e-3': ExpertLevel(weight=1e-3),
  'aux 1e-2': ExpertLevel(weight=1e-2),
}


@pytest.mark.parametrize('method', METHODS)
def test_dials_in_the_state_do_what_the_idea_with_these_constants_does(method):
  gate = make_gate(np.random.default_rng(0).normal(size=(2, 9, 6)), 'sigmoid', 2)
  dials = Dialled().init(jax.random.key(0), Sizes(6, 2, 8, 7)) | METHODS[method]
  dials = {name: jnp.asarray(value) for name, value in dials.items()}
  want = IDEAS[method].loss(gate, {})
  np.testing.assert_allclose(Dialled().loss(gate, dials), want, rtol=1e-6)
  seen, bias_LE = Seen(gate.load_E[None], {}, 2), jnp.full((1, 6), 0.5)
  stacked = {name: value[None] for name, value in dials.items()}
  want_LE = IDEAS[method].update_bias(bias_LE, {}, seen)
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
