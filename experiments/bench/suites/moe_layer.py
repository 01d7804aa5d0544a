"""A whole layer of experts, router to output, forward and backward, and where its time goes.

`layer` is models.MoE on one device with weights in the compute precision, the router float32: gate,
choice, experts, shared experts; backward to the tokens, the router and every matrix. Its parts are
timed one by one on operands of the same shapes. torch has no such layer; `dense` is XLA's matmul of
as many operations.
"""

# T tokens  D model  F width of an expert  E experts  K experts a token  R rows

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import table, timing
from moe_jax import sharding as sh
from moe_jax.config import MoEConfig
from moe_jax.models.attention.base import Where, spread
from moe_jax.models.moe import MoE
from moe_jax.ops.grouped_matmul import grouped_matmul, input_grad, weight_grad
from moe_jax.ops.permute import sort_by_destination, spread_rows, sum_rows
from moe_jax.ops.route import gate_logits, scores, top_k_route
from moe_jax.ops.swiglu import swiglu_backward, swiglu_forward
from moe_jax.precision import policy
from moe_jax.routing import Balance

LIMIT = {'bfloat16': 790.0}  # TFLOP/s, see suites/grouped_matmul.py
BANDWIDTH = 3000.0  # GB/s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  name: str
  tokens: int
  d: int
  moe: MoEConfig

  @property
  def flops(self) -> int:
    """Of the forward pass: gate, routed and shared experts; the backward pass has twice as many."""
    m = self.moe
    width = 3 * m.d_expert * (m.top_k + m.num_shared) + m.num_experts
    return 2 * self.tokens * self.d * width

  def __str__(self) -> str:
    m = self.moe
    shared = f' + {m.num_shared} shared' if m.num_shared else ''
    return f'T{self.tokens} D{self.d} F{m.d_expert} E{m.num_experts} K{m.top_k}{shared}'


def _moe(num_experts: int, top_k: int, d_expert: int, num_shared: int) -> MoEConfig:
  return MoEConfig(
    num_experts=num_experts, top_k=top_k, d_expert=d_expert, num_shared=num_shared, score='softmax'
  )


SPECS = (
  Spec(name='fine', tokens=24576, d=1536, moe=_moe(128, 8, 256, 0)),
  Spec(name='v2_lite', tokens=32768, d=2048, moe=_moe(64, 6, 1408, 2)),
)
TINY = Spec(name='tiny', tokens=256, d=128, moe=_moe(8, 2, 128, 1))
# the spread of the selection bias, which makes some experts favourites
SKEWS = {'drawn': 0.0, 'skewed': 0.005}


def run(only: str = '') -> Iterator[list[table.Row]]:
  on_gpu = jax.default_backend() == 'gpu'
  for spec in SPECS if on_gpu else (TINY,):
    for label, skew in SKEWS.items():
      if only in spec.name:
        with jax.set_mesh(sh.make_mesh((1, 1, 1))):
          yield run_layer(spec, label, skew)
    if only in spec.name:
      yield run_parts(spec)


def make(spec: Spec, precision: str, skew: float) -> tuple[Any, tuple[Any, ...]]:
  """The layer with its gradients, and its operands."""
  model = MoE(spec.moe, Balance(), spec.d**-0.5, policy(precision))
  one = jnp.ones((1, spec.tokens), jnp.int32)
  where = spread(Where(one, one, one, jnp.zeros(1, jnp.int32)))

  @jax.jit
  def start(key: jax.Array):
    x = jax.random.normal(key, (1, spec.tokens, spec.d), policy(precision).activations)
    x = jax.sharding.reshard(x, sh.STREAM)
    variables = model.init(key, x, where)
    cast = lambda path, a: a if path[-1].key == 'router_DE' else policy(precision).cast(a)
    params = jax.tree_util.tree_map_with_path(cast, variables['params'])
    bias = skew * jax.random.normal(key, (spec.moe.num_experts,))
    return x, params, {'bias_E': bias}

  x, params, router = start(jax.random.key(0))
  layer = lambda x, params: model.apply({'params': params, 'router': router}, x, where)[0]

  @jax.jit
  def there_and_back(x, params, dy):
    y, vjp = jax.vjp(layer, x, params)
    return y, *vjp(dy)

  return there_and_back, (x, params, x)


def run_layer(spec: Spec, label: str, skew: float, precision: str = 'bfloat16') -> list[table.Row]:
  call, args = make(spec, precision, skew)
  call = call.lower(*args).compile()
  memory = call.memory_analysis()
  note = f'{memory.temp_size_in_bytes / 2**30:.1f} GiB beside operands and results'
  measured = timing.measure(call, [args], block=jax.block_until_ready)
  row = functools.partial(
    table.row_of, amount=3 * spec.flops, unit='TFLOP/s', limit=LIMIT[precision], shape=str(spec)
  )
  rows = [row(measured, work='fwd+bwd', by=f'layer {precision}', sizes=label, note=note)]
  if label == 'drawn' and jax.default_backend() == 'gpu':
    # as many operations in three square products
    side = int(round((spec.flops / 2) ** (1 / 3), -2))
    a = jnp.ones((side, side), jnp.bfloat16)
    dense = jax.jit(lambda a: a @ a)
    measured = timing.measure(dense, [(a,)], block=jax.block_until_ready)
    rows.append(row(measured, amount=2 * side**3, work='a third', by='dense bfloat16', sizes=''))
  return rows


def run_parts(spec: Spec) -> list[table.Row]:
  m, R = spec.moe, spec.tokens * spec.moe.top_k
  E, D, F, K = m.num_experts, spec.d, m.d_expert, m.top_k
  keys = jax.random.split(jax.random.key(0), 6)

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def draw(key, shape, dtype='bfloat16'):
    return jax.random.normal(key, shape, jnp.dtype(dtype)) * shape[-1] ** -0.5

  x, router = draw(keys[0], (1, spec.tokens, D)), draw(keys[1], (D, E), 'float32')
  gate_up, down = draw(keys[2], (E, D, 2 * F)), draw(keys[3], (E, F, D))
  choose = lambda x, r: top_k_route(scores(gate_logits(x, r), m.score), jnp.zeros(E), k=K)
  expert, weight = (a[0] for a in jax.jit(choose)(x, router))
  plan = functools.partial(sort_by_destination, num_destinations=E, num_rows=R)
  p = jax.jit(plan)(expert)
  x = x[0]
  x_R, h, a = draw(keys[4], (R, D)), draw(keys[5], (R, 2 * F)), draw(keys[5], (R, F))
  by_row = jax.jit(p.by_row)(weight)
  rows: list[table.Row] = []

  def add(work: str, fn: Callable, *args, flops: float = 0.0, moved: float = 0.0):
    measured = timing.measure_jax(jax.jit(fn), *args, repeats=5)
    kind: Any = dict(amount=flops, unit='TFLOP/s', limit=LIMIT['bfloat16'])
    if moved:
      kind = dict(amount=moved, unit='GB/s', limit=BANDWIDTH)
    rows.append(
      table.row_of(measured, work=work, by='part', shape=str(spec), sizes='drawn', **kind)
    )

  whole, half, size = 4 * R * D * F, 2 * R * D * F, 2
  sizes = p.size_E
  add('gate and choice', choose, x[None], router, flops=2 * spec.tokens * D * E)
  add('sort', plan, expert, moved=3 * 4 * R)
  spread = lambda x, *p_: spread_rows(x, type(p)(*p_))
  # three times in all: x, and in the backward pass x and the gradient of the output
  add('spread rows (1 of 3)', spread, x, *p, moved=size * D * (spec.tokens + R))
  add('gate_up', grouped_matmul, x_R, gate_up, sizes, flops=whole)
  add('swiglu', swiglu_forward, h, moved=size * R * F * 3)
  add('down', grouped_matmul, a, down, sizes, flops=half)
  add('combine', sum_rows, x_R, p.row_TK, weight, moved=size * D * (spec.tokens + R))
  add('down dgrad', input_grad, x_R, down, sizes, flops=half)
  add('swiglu backward', swiglu_backward, a, h, by_row, moved=size * R * F * 6)
  wgrad = functools.partial(weight_grad, dtype=jnp.bfloat16)
  add('down wgrad', wgrad, a, x_R, sizes, flops=half)
  add('gate_up dgrad', input_grad, h, gate_up, sizes, flops=whole)
  add('sum of dx', sum_rows, x_R, p.row_TK, moved=size * D * (spec.tokens + R))
  add('gate_up wgrad', wgrad, x_R, h, sizes, flops=whole)
  assert np.asarray(sizes).sum() == R
  return rows
