"""What quantising loses, measured on the operands of a running step, gradients included.

A probe is a place in the model where a tensor passes unchanged. Handed an array of zeros, it makes
measurements of the tensor and, in the backward pass, of the tensor's gradient; both come out as the
"gradient" in that array. Steps without probes cost nothing.
"""

# X values of a tile  N names

import jax
import jax.numpy as jnp

from moe_jax.ops.quantize import TILE
from moe_jax.ops.quantize.format import Format, magnitude, scale_and_inverse

NAMES = ('overflow', 'underflow', 'lost', 'error', 'scale_min', 'scale_max')


def measure(x: jax.Array, fmt: Format, *, by_tensor: bool = False) -> jax.Array:
  """[N], in the order of NAMES, of quantising x along its last dimension.

  overflow: share of values that are not finite afterwards. underflow: share of nonzero values that
  become zero. lost: their share of the sum of magnitudes. error: of the norm, relative. scale_min
  and scale_max: of the tiles' scales, tiles of zeros left out.
  """
  x = x.astype(jnp.float32)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % TILE)])
  x_X = x.reshape(*x.shape[:-1], -1, TILE)
  return _measured(x_X, magnitude(x_X).max(None if by_tensor else -1, keepdims=True), fmt)


def measure_blocks(w: jax.Array, fmt: Format) -> jax.Array:
  """`measure` of a matrix [..., D, F] with a scale for each 128 x 128."""
  pad = [(0, 0)] * (w.ndim - 2) + [(0, -n % TILE) for n in w.shape[-2:]]
  w = jnp.pad(w.astype(jnp.float32), pad)
  *lead, d, f = w.shape
  blocks = w.reshape(*lead, d // TILE, TILE, f // TILE, TILE)
  return _measured(blocks, magnitude(blocks).max((-3, -1), keepdims=True), fmt)


def _measured(x: jax.Array, largest: jax.Array, fmt: Format) -> jax.Array:
  scale, inverse = scale_and_inverse(largest, fmt)
  rounded = (x * inverse).astype(fmt.dtype).astype(jnp.float32) * scale
  vanished = (rounded == 0) & (x != 0)
  total = lambda a: jnp.maximum(a.sum(), 1e-30)
  norm = lambda a: jnp.sqrt(jnp.square(a).sum())
  live = largest > 0
  return jnp.stack([
    (~jnp.isfinite(rounded)).mean(),
    vanished.sum() / total((x != 0).astype(jnp.float32)),
    jnp.where(vanished, jnp.abs(x), 0).sum() / total(jnp.abs(x)),
    # in units of the largest scale: squares of small gradients would underflow
    norm((rounded - x) / scale.max()) / jnp.maximum(norm(x / scale.max()), 1e-30),
    jnp.where(live, scale, jnp.inf).min(),
    jnp.where(live, scale, 0).max(),
  ])  # fmt: skip


def probe(x: jax.Array, zeros_2N: jax.Array, fmt: Format, *, by_tensor: bool = False) -> jax.Array:
  """x itself; the gradient in `zeros_2N` is `measure` of x and of x's gradient."""

  @jax.custom_vjp
  def passed(x: jax.Array, zeros_2N: jax.Array) -> jax.Array:
    del zeros_2N
    return x

  def forward(x: jax.Array, zeros_2N: jax.Array):
    del zeros_2N
    return x, measure(x, fmt, by_tensor=by_tensor)

  def backward(seen_N: jax.Array, dx: jax.Array):
    return dx, jnp.stack([seen_N, measure(dx, fmt, by_tensor=by_tensor)])

  passed.defvjp(forward, backward)
  return passed(x, zeros_2N)
