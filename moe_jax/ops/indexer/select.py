"""Which keys a query attends to, for some queries at a time: never the scores of all pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ops import backends
from moe_jax.ops.indexer import mosaic_scores, reference, triton_top_k

# S queries  T keys  J index heads  I index width  K chosen  C queries of a chunk

# float32 scores of a chunk: 512 MiB
_CHUNK_ELEMENTS = 2**27
_FP8 = jnp.float8_e4m3fn


def select_keys(
  q_SJI: Float[Array, 'S J I'],
  k_TI: Float[Array, 'T I'],
  weight_SJ: Float[Array, 'S J'],
  first_S: Int[Array, 'S'],
  end_S: Int[Array, 'S'],
  *,
  k: int,
  fp8: bool = False,
  implementation: str | None = None,
) -> tuple[Int[Array, 'S K'], Int[Array, 'S']]:
  """The k keys of first <= t < end that score highest (`reference.index_scores`), and their number.

  Exact; of equal scores the earliest win. In ascending order, zeros where there are fewer than k.
  Reads every score once and takes time linear in them. Passes no gradient.

  Args:
    k: K is the smaller of k and T.
    fp8: rounds q and k to float8_e4m3fn with a scale for each row, as released kernels do.
    implementation: 'kernels' (Hopper, bfloat16) or 'xla', which then runs or raises
      NotImplementedError with the reason. None takes the fastest that can.
  """
  q_SJI, k_TI, weight_SJ = jax.lax.stop_gradient((q_SJI, k_TI, weight_SJ))
  (S, J, I), T, k = q_SJI.shape, k_TI.shape[0], min(k, k_TI.shape[0])
  count_S = jnp.clip(end_S - first_S, 0, k)
  weight_SJ = weight_SJ.astype(jnp.float32) * I**-0.5
  scale_T = None
  if fp8:
    (q_SJI, scale_SJ), (k_TI, scale_T) = quantize(q_SJI), quantize(k_TI)
    weight_SJ *= scale_SJ
  if _choose(implementation, k_TI.dtype, T, J, I) == 'kernels':

    def one_chunk(args):
      q, weight, first, end = args
      score_CT = mosaic_scores.scores(q, k_TI, weight, scale_T, first, end)
      return triton_top_k.top_k(score_CT, first, end, k=k)

    size = chunk_size(S, T)
  else:

    def one_chunk(args):
      q, weight, first, end = args
      # float8 products are exact in bfloat16
      wide = lambda a: a.astype(jnp.bfloat16) if fp8 else a
      score_CT = reference.index_scores(wide(q)[None], wide(k_TI)[None], weight[None])[0]
      if scale_T is not None:
        score_CT *= scale_T
      return _xla_top_k(score_CT, first, end, k=k)

    size = chunk_size(S, T * J)
  split = lambda a: a.reshape(S // size, size, *a.shape[1:])
  index = jax.lax.map(one_chunk, tuple(map(split, (q_SJI, weight_SJ, first_S, end_S))))
  return index.reshape(S, k), count_S.astype(jnp.int32)


def select_from_scores(
  score_BST: Float[Array, 'B S T'],
  first_BS: Int[Array, 'B S'],
  end_BS: Int[Array, 'B S'],
  *,
  k: int,
) -> tuple[Int[Array, 'B S K'], Int[Array, 'B S']]:
  """As select_keys, where the scores are there already."""
  (B, S, T), k = score_BST.shape, min(k, score_BST.shape[2])
  args = score_BST.reshape(B * S, T), first_BS.reshape(-1), end_BS.reshape(-1)
  if jax.default_backend() == 'gpu':
    index = triton_top_k.top_k(*args, k=k)
  else:
    index = _xla_top_k(*args, k=k)
  return index.reshape(B, S, k), jnp.clip(end_BS - first_BS, 0, k).astype(jnp.int32)


def quantize(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  """float8_e4m3fn with the largest of each row at its end, and the rows' scales."""
  a = a.astype(jnp.float32)
  scale = jnp.maximum(jnp.abs(a).max(-1), 1e-12) / float(jnp.finfo(_FP8).max)
  return (a / scale[..., None]).astype(_FP8), scale


def chunk_size(num_queries: int, elements_a_query: int) -> int:
  """The largest divisor of the queries that keeps a chunk's scores in bounds, at least 1."""
  most = max(1, _CHUNK_ELEMENTS // elements_a_query)
  return next(c for c in range(min(most, num_queries), 0, -1) if num_queries % c == 0)


def _xla_top_k(score_CT: jax.Array, first_C: jax.Array, end_C: jax.Array, *, k: int) -> jax.Array:
  key_T = jnp.arange(score_CT.shape[1])
  inside_CT = (key_T >= first_C[:, None]) & (key_T < end_C[:, None])
  # -0 equals 0; top_k would put it below
  score_CT = jnp.where(score_CT == 0, 0.0, score_CT)
  _, index_CK = jax.lax.top_k(jnp.where(inside_CT, score_CT, -jnp.inf), k)
  used_CK = jnp.arange(k) < (end_C - first_C)[:, None]
  index_CK = jnp.sort(jnp.where(used_CK, index_CK, key_T.size), axis=-1)
  return jnp.where(used_CK, index_CK, 0).astype(jnp.int32)


def _choose(implementation: str | None, *shape) -> str:
  problem = mosaic_scores.unsupported(*shape)
  return backends.choose('select_keys', implementation, problem, fast='kernels')
