"""A whole layer of experts, router to output, forward and backward, and where its time goes.

`layer` is models.MoE on one device with weights in the compute precision, the router float32: gate,
choice, experts, shared experts; backward to the tokens, the router and every matrix. In FP8 that
includes quantising the matrices both ways, which a training step does once for all of its
micro-batches. `part` rows are the kernels of a traced call, added up by the names that ops give
them, and their share; what the parts lack to the whole is time between kernels and a warmer chip.
XLA joins the sum of the rows of dx with the gate's addition to it: it is in `gate, bwd`. torch has
no such layer; `dense` is XLA's matmul of as many operations as the forward pass has.
"""

# T tokens  D model  F width of an expert  E experts  K experts a token  R rows

import collections
import concurrent.futures
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

# before any backend starts: it turns off what hides kernels from the profiler
from experiments.bench import profile_step, table, timing
from moe_jax import sharding as sh
from moe_jax.config import MoEConfig
from moe_jax.models.attention.base import Where, spread
from moe_jax.models.moe import MoE
from moe_jax.ops.grouped_matmul.specs import recorded, zipf
from moe_jax.ops.route import choose_experts, scores
from moe_jax.precision import policy, quantized_copy
from moe_jax.routing import Balance

# TFLOP/s of large dense matmuls, see suites/grouped_matmul.py
LIMIT = {'bfloat16': 790.0, 'fp8_block': 1430.0}
# names in the profile, as ops give them, the first that fits
PARTS = (
  'shared', 'quantize', 'grouped_matmul', 'spread', 'combine', 'swiglu', 'sort', 'choose', 'gate',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  name: str
  tokens: int
  d: int
  moe: MoEConfig
  precisions: tuple[str, ...] = ('bfloat16', 'fp8_block')

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
  Spec(name='fine', tokens=24576, d=1536, moe=_moe(128, 8, 256, 0), precisions=('bfloat16',)),
  Spec(name='v2_lite', tokens=32768, d=2048, moe=_moe(64, 6, 1408, 2)),
)
TINY = Spec(name='tiny', tokens=256, d=128, moe=_moe(8, 2, 128, 1))
# loads of the experts: as the random router gives them, and as a selection bias makes them
LOADS = {'drawn': None, 'recorded': recorded, 'zipf': zipf}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """One row to be: what is called, and what of it counts."""

  work: str
  by: str
  fn: Any  # jitted
  args: tuple
  flops: float = 0.0
  sizes: str = 'drawn'


def run(only: str = '') -> Iterator[list[table.Row]]:
  for spec in SPECS if jax.default_backend() == 'gpu' else (TINY,):
    for precision in spec.precisions:
      if only in f'{spec.name} {precision}':
        with jax.set_mesh(sh.make_mesh((1, 1, 1))):
          yield run_layer(spec, precision)


def run_layer(spec: Spec, precision: str) -> list[table.Row]:
  calls = layer_calls(spec, precision)
  pairs = list(zip(calls, _compile(calls), strict=True))
  rows = [_row(spec, *pair) for pair in pairs]
  for call, compiled in pairs:
    if call.sizes == 'drawn':
      rows += breakdown(spec, call, compiled)
  return rows


def _compile(calls: list[Call]) -> list[Any]:
  """Side by side, since a kernel takes longer to compile than to time."""
  lowered = {call.fn: call.fn.lower(*call.args) for call in calls}
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    compiled = dict(zip(lowered, pool.map(lambda l: l.compile(), lowered.values()), strict=True))
  return [compiled[call.fn] for call in calls]


def _row(spec: Spec, call: Call, compiled: Any) -> table.Row:
  measured = timing.measure(compiled, [call.args], block=jax.block_until_ready)
  names = dict(work=call.work, by=call.by, shape=str(spec), sizes=call.sizes)
  if call.by.startswith('layer'):
    temporary = compiled.memory_analysis().temp_size_in_bytes
    names['note'] = f'{temporary / 2**30:.1f} GiB beside operands and results'
  limit = LIMIT[call.by.split()[-1]]
  return table.row_of(measured, amount=call.flops, unit='TFLOP/s', limit=limit, **names)


def breakdown(spec: Spec, call: Call, compiled: Any, repeats: int = 3) -> list[table.Row]:
  """Device time of each part of a call; nothing where the profiler sees no GPU."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(repeats):
        jax.block_until_ready(compiled(*call.args))
    (profile,) = pathlib.Path(folder).rglob('*.xplane.pb')
    spent = profile_step.by_operation(profile, compiled.as_text())
  parts: collections.Counter = collections.Counter()
  for (which, name, kernel), nanoseconds in spent.items():
    found = (part for part in PARTS if part in f'{name} {kernel}')
    parts[next(found, 'rest'), which] += nanoseconds
  total = sum(parts.values())
  return [
    table.Row(
      work=f'{part}, {which}',
      by=f'part of {call.by}',
      shape=str(spec),
      sizes=call.sizes,
      ms=nanoseconds / repeats / 1e6,
      spread=None,
      rate=100 * nanoseconds / total,
      unit='%',
      of_limit=nanoseconds / total,
    )
    for (part, which), nanoseconds in parts.most_common()
  ]


def layer_calls(spec: Spec, precision: str) -> list[Call]:
  fn, (x, params) = make(spec, precision)
  calls = [
    Call(
      work='fwd+bwd',
      by=f'layer {precision}',
      fn=fn,
      args=(x, params, {'bias_E': bias_for(spec, label, x, params['router_DE'])}, x),
      flops=3 * spec.flops,
      sizes=label,
    )
    for label in LOADS
  ]
  if jax.default_backend() == 'gpu' and precision == 'bfloat16':
    # as many operations as the forward pass has, in one square product
    side = round((spec.flops / 2) ** (1 / 3) / 128) * 128
    # random: a product of ones draws less power, and so runs faster
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    dense = jax.jit(lambda a: a @ a)
    args: Any = dict(fn=dense, args=(square,), flops=2 * side**3, sizes='')
    calls.append(Call(work='fwd', by='dense bfloat16', **args))
  return calls


@functools.partial(jax.jit, static_argnums=(0, 1))
def bias_for(spec: Spec, label: str, x_1TD: jax.Array, router_DE: jax.Array) -> jax.Array:
  """A selection bias under which experts have about the named load; no expert more than T."""
  E, K = spec.moe.num_experts, spec.moe.top_k
  shares = LOADS[label]
  if shares is None:
    return jnp.zeros(E)
  wanted_E = jnp.minimum(jnp.array(shares(spec.tokens * K, E)), 0.95 * spec.tokens) / spec.tokens
  score_TE = scores(jnp.dot(x_1TD[0].astype(jnp.float32), router_DE), spec.moe.score)

  def step(i, bias_E):
    expert_TK = choose_experts(score_TE, bias_E, k=K)
    load_E = (expert_TK[..., None] == jnp.arange(E)).any(1).mean(0)
    # as wide as the scores are at first, then finer
    return bias_E + score_TE.std() * 0.97**i * (wanted_E - load_E)

  return jax.lax.fori_loop(0, 150, step, jnp.zeros(E))


def make(spec: Spec, precision: str) -> tuple[Any, tuple[Any, ...]]:
  """The layer with its gradients, and tokens and parameters."""
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
    return x, params

  @jax.jit
  def there_and_back(x, params, router, dy):
    rest = {'router': router} | quantized_copy(policy(precision), params)
    layer = lambda x, params: model.apply({'params': params} | rest, x, where)[0]
    y, vjp = jax.vjp(layer, x, params)
    # a loss stands between the passes: without one XLA puts off what only y needs, and copies h
    y, dy = jax.lax.optimization_barrier((y, dy))
    return y, *vjp(dy)

  return there_and_back, start(jax.random.key(0))
