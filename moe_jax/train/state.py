"""Everything a run carries from one step to the next, in one tree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax import routing
from moe_jax import sharding as sh
from moe_jax.config import RunConfig
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Decoder
from moe_jax.optim import GuardState, optimizer
from moe_jax.precision import policy_of


class TrainState(NamedTuple):
  """A checkpoint is this tree and nothing else.

  Randomness needs no place here: whatever a step draws is a function of (seed, step).
  """

  step: jax.Array  # int32 steps done, refused ones included
  batch: jax.Array  # int32 index of the next batch
  params: Any
  router: Any  # selection biases, hash tables
  ideas: Any  # what balancing ideas carry from step to step
  opt: optax.OptState
  guard: GuardState

  @property
  def rest(self) -> dict[str, Any]:
    """A model's variables beside its parameters: no gradient reaches them."""
    return {'router': self.router, 'ideas': self.ideas}

  @property
  def variables(self) -> dict[str, Any]:
    return {'params': self.params, **self.rest}


def make_model(cfg: RunConfig, *, training: bool = False) -> Decoder:
  """The model; `training` where tokens are routed to train, see `routing.Balance`."""
  balance = routing.choose(cfg.balance, cfg.routing, cfg.model.moe)
  return Decoder(cfg.model, policy_of(cfg), balance.to_train() if training else balance)


def make_optimizer(cfg: RunConfig) -> optax.GradientTransformation:
  return optimizer(cfg.optim, cfg.steps, seed=cfg.seed)


def init_variables(model: Decoder, key: jax.Array) -> Any:
  """Random variables of a model on the current mesh: `params`, `router`, `ideas`."""
  mesh = jax.sharding.get_abstract_mesh()
  rows = mesh.shape[sh.DATA] * mesh.shape[sh.EXPERT]
  token_BS = jnp.zeros((rows, 2), jnp.int32, out_sharding=sh.TOKENS)
  start_B = jnp.zeros((rows,), jnp.int32, out_sharding=sh.BY_ROW)
  keys = {'params': key, 'ideas': jax.random.fold_in(key, 1)}
  return model.init(keys, Where(token_BS, token_BS, token_BS, start_B))


def create(cfg: RunConfig, key: jax.Array) -> TrainState:
  """A fresh state on the current mesh.

  `jax.eval_shape(partial(create, cfg), key)` carries every shape, dtype and sharding: it is the
  restore target, the memory estimate and the only table of shardings.
  """
  variables = init_variables(make_model(cfg), key)
  params = variables['params']
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=zero,
    batch=zero,
    params=params,
    router=variables.get('router', {}),
    ideas=variables.get('ideas', {}),
    opt=make_optimizer(cfg).init(params),
    guard=GuardState.create(cfg.guard),
  )
