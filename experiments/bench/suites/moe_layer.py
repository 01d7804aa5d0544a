"""A whole layer of experts, router to output, forward and backward, and where its time goes.

`layer` is models.MoE on one device with weights in the compute precision, the router float32: gate,
choice, experts, shared experts; backward to the tokens, the router and every matrix. Its parts are
timed one by one on operands of the same shapes. torch has no such layer; `dense` is XLA's matmul of
as many operations.
"""

# T tokens  D model  F width of an expert  E experts  K experts a token  R rows

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """One row to be: what is called, and what of it counts."""

  work: str
  by: str
  fn: Any  # jitted
  args: tuple
  flops: float = 0.0
  moved: float = 0.0  # bytes, where memory is the limit
  sizes: str = 'drawn'


def run(only: str = '') -> Iterator[list[table.Row]]:
  on_gpu = jax.default_backend() == 'gpu'
  for spec in SPECS if on_gpu else (TINY,):
    if only in spec.name:
      with jax.set_mesh(sh.make_mesh((1, 1, 1))):
        layer = layer_calls(spec)
        layer = list(zip(layer, _compile(layer), strict=True))
      # outside the mesh, whose axes parts know nothing of
      parts = part_calls(spec)
      yield [_row(spec, *pair) for pair in [*layer, *zip(parts, _compile(parts), strict=True)]]


def _compile(calls: list[Call]) -> list[Any]:
  """Side by side, since a kernel takes longer to compile than to time."""
  lowered = {call.fn: call.fn.lower(*call.args) for call in calls}
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    compiled = dict(zip(lowered, pool.map(lambda l: l.compile(), lowered.values()), strict=True))
  return [compiled[call.fn] for call in calls]


def _row(spec: Spec, call: Call, compiled: Any) -> table.Row:
  # a layer's operands are larger than any cache; a part's may not be
  copies = timing.num_copies(jax.tree.leaves(call.args)) if call.by == 'part' else 1
  args = [call.args] + [jax.tree.map(lambda a: a + 0, call.args) for _ in range(copies - 1)]
  measured = timing.measure(compiled, args, block=jax.block_until_ready)
  names = dict(work=call.work, by=call.by, shape=str(spec), sizes=call.sizes)
  if call.by.startswith('layer'):
    temporary = compiled.memory_analysis().temp_size_in_bytes
    names['note'] = f'{temporary / 2**30:.1f} GiB beside operands and results'
  if call.moved:
    return table.row_of(measured, amount=call.moved, unit='GB/s', limit=BANDWIDTH, **names)
  limit = LIMIT[call.by.split()[-1]] if call.by != 'part' else LIMIT['bfloat16']
  return table.row_of(measured, amount=call.flops, unit='TFLOP/s', limit=limit, **names)


def layer_calls(spec: Spec) -> list[Call]:
  calls = []
  for precision in LIMIT:
    fn, (x, params, bias) = make(spec, precision)
    calls += [
      Call(
        work='fwd+bwd',
        by=f'layer {precision}',
        fn=fn,
        args=(x, params, {'bias_E': skew * bias}, x),
        flops=3 * spec.flops,
        sizes=label,
      )
      for label, skew in SKEWS.items()
    ]
  if jax.default_backend() == 'gpu':
    # as many operations as the forward pass has, in one square product
    side = int(round((spec.flops / 2) ** (1 / 3), -2))
    square = jnp.ones((side, side), jnp.bfloat16)
    dense = jax.jit(lambda a: a @ a)
    args: Any = dict(fn=dense, args=(square,), flops=2 * side**3, sizes='')
    calls.append(Call(work='fwd', by='dense bfloat16', **args))
  return calls


def make(spec: Spec, precision: str) -> tuple[Any, tuple[Any, ...]]:
  """The layer with its gradients, and tokens, parameters and a selection bias of deviation 1."""
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
    return x, params, jax.random.normal(key, (spec.moe.num_experts,))

  @jax.jit
  def there_and_back(x, params, router, dy):
    layer = lambda x, params: model.apply({'params': params, 'router': router}, x, where)[0]
    y, vjp = jax.vjp(layer, x, params)
    return y, *vjp(dy)

  return there_and_back, start(jax.random.key(0))


def part_calls(spec: Spec) -> list[Call]:
  m, R = spec.moe, spec.tokens * spec.moe.top_k
  E, D, F, K = m.num_experts, spec.d, m.d_expert, m.top_k
  keys = jax.random.split(jax.random.key(0), 6)

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def draw(key, shape, dtype='bfloat16'):
    return jax.random.normal(key, shape, jnp.dtype(dtype)) * shape[-1] ** -0.5

  x, router = draw(keys[0], (1, spec.tokens, D)), draw(keys[1], (D, E), 'float32')
  gate_up, down = draw(keys[2], (E, D, 2 * F)), draw(keys[3], (E, F, D))
  choose = lambda x, r: top_k_route(scores(gate_logits(x, r), m.score), jnp.zeros(E), k=K)
  plan = functools.partial(sort_by_destination, num_destinations=E, num_rows=R)
  expert, weight = (a[0] for a in jax.jit(choose)(x, router))
  p = jax.jit(plan)(expert)
  x_R, h, a = draw(keys[4], (R, D)), draw(keys[5], (R, 2 * F)), draw(keys[5], (R, F))
  by_row = jax.jit(p.by_row)(weight)
  wgrad = functools.partial(weight_grad, dtype=jnp.bfloat16)

  def part(work: str, fn: Callable, *args: Any, flops: float = 0.0, moved: float = 0.0) -> Call:
    return Call(work=work, by='part', fn=jax.jit(fn), args=args, flops=flops, moved=moved)

  sizes, whole, half = p.size_E, 4 * R * D * F, 2 * R * D * F
  tokens_and_rows = 2 * D * (spec.tokens + R)
  return [
    part('gate and choice', choose, x, router, flops=2 * spec.tokens * D * E),
    part('sort', plan, expert, moved=3 * 4 * R),
    # three times in all: x, and in the backward pass x and the gradient of the output
    part('spread rows, 1 of 3', spread_rows, x[0], p, moved=tokens_and_rows),
    part('gate_up', grouped_matmul, x_R, gate_up, sizes, flops=whole),
    part('swiglu', swiglu_forward, h, moved=2 * R * F * 3),
    part('down', grouped_matmul, a, down, sizes, flops=half),
    part('combine', sum_rows, x_R, p.row_TK, weight, moved=tokens_and_rows),
    part('down dgrad', input_grad, x_R, down, sizes, flops=half),
    # with a copy of a and h, as their memory is reused for the results
    part('swiglu backward, copies', swiglu_backward, a, h, by_row, moved=2 * R * F * 12),
    part('down wgrad', wgrad, a, x_R, sizes, flops=half),
    part('gate_up dgrad', input_grad, h, gate_up, sizes, flops=whole),
    part('sum of dx', sum_rows, x_R, p.row_TK, moved=tokens_and_rows),
    part('gate_up wgrad', wgrad, x_R, h, sizes, flops=whole),
  ]
