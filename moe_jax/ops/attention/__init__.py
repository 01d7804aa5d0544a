"""Dense causal attention that never crosses a document's border.

Backends: 'mosaic' (Hopper, bfloat16), 'cudnn' (GPUs, equal widths), 'chunked' and 'reference'
(everything; the second makes the scores of all pairs). reference.py is the definition.
"""

import functools
import logging

import jax
from jaxtyping import Array, Bool, Float, Int

from moe_jax.ops.attention import chunked, cudnn, mosaic, reference
from moe_jax.ops.attention.reference import latent_attention, visible

__all__ = ['attention', 'attention_and_lse', 'latent_attention', 'masked_attention', 'visible']

# B batch  S queries  T keys  H query heads  G key-value heads  C key width  V value width

IMPLEMENTATIONS = ('reference', 'chunked', 'cudnn', 'mosaic')
_BLOCK = 512
_log = logging.getLogger(__name__)


def attention(
  q_BSHC: Float[Array, 'B S H C'],
  k_BTGC: Float[Array, 'B T G C'],
  v_BTGV: Float[Array, 'B T G V'],
  q_segment_BS: Int[Array, 'B S'],
  k_segment_BT: Int[Array, 'B T'],
  start_B: Int[Array, 'B'],
  sink_H: Float[Array, 'H'] | None = None,
  *,
  scale: float,
  window: int | None = None,
  implementation: str | None = None,
) -> Float[Array, 'B S H V']:
  """Attention of each query over the keys of its own document up to itself.

  Args:
    k_BTGC: H / G query heads in a row share a key-value head.
    q_segment_BS: document number of every query; k_segment_BT likewise of every key. A document
      is a run of equal numbers; without a cache (S = T) both are the same array and start_B is 0.
    start_B: index of the first query among the keys (0 without a cache).
    sink_H: scores of no key, one a head, that only enlarge the softmax's sum.
    scale: what the products are multiplied by before the softmax.
    window: the most keys a query sees, itself among them.
    implementation: `reference`; `chunked`, memory linear in the sequence; `cudnn`, fused, on GPUs
      in 16 bits; or `mosaic`, which also skips what no query sees. By default the fastest that can.

  Raises:
    NotImplementedError: the named implementation cannot take these operands; it says why.
    ValueError: an unknown implementation.
  """
  extra = sink_H is not None or window is not None or q_BSHC.shape[2] != k_BTGC.shape[2]
  by = _choose(q_BSHC, k_BTGC, v_BTGV, extra, implementation)
  if by == 'cudnn':
    return cudnn.attention(q_BSHC, k_BTGC, v_BTGV, q_segment_BS, scale=scale)
  if by == 'reference' and not extra:
    mask_BST = visible(q_segment_BS, k_segment_BT, start_B)
    return reference.attention(q_BSHC, k_BTGC, v_BTGV, mask_BST, scale=scale)
  operands = (q_BSHC, k_BTGC, v_BTGV, q_segment_BS, k_segment_BT, start_B, sink_H)
  return attention_and_lse(*operands, scale=scale, window=window, implementation=by)[0]


def attention_and_lse(
  q_BSHC: Float[Array, 'B S H C'],
  k_BTGC: Float[Array, 'B T G C'],
  v_BTGV: Float[Array, 'B T G V'],
  q_segment_BS: Int[Array, 'B S'],
  k_segment_BT: Int[Array, 'B T'],
  start_B: Int[Array, 'B'],
  sink_H: Float[Array, 'H'] | None = None,
  *,
  scale: float,
  window: int | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B S H V'], Float[Array, 'B H S']]:
  """`attention`, and the float32 logarithm of each softmax's sum, differentiable too.

  cuDNN does not give it.
  """
  by = _choose(q_BSHC, k_BTGC, v_BTGV, True, implementation)
  operands = q_BSHC, k_BTGC, v_BTGV
  if by == 'mosaic':
    return mosaic.attention(*operands, q_segment_BS, sink_H, scale=scale, window=window)
  if by == 'chunked':
    segments = q_segment_BS, k_segment_BT, start_B
    return chunked.attention(*operands, *segments, sink_H, scale=scale, window=window, block=_BLOCK)
  mask_BST = visible(q_segment_BS, k_segment_BT, start_B, window=window)
  return reference.attention_and_lse(*operands, mask_BST, sink_H, scale=scale)


def _choose(
  q: jax.Array, k: jax.Array, v: jax.Array, extra: bool, implementation: str | None
) -> str:
  """`extra`: more is asked than cuDNN is used for."""
  refusals = {'reference': None, 'mosaic': mosaic.refusal(q, k, v), 'chunked': None}
  refusals['cudnn'] = cudnn.refusal(q, k, v) or (
    'cuDNN is not used for windows, sinks, shared key heads or the logsumexp' if extra else None
  )
  if q.shape[1] % _BLOCK:
    reason = f'chunked attention needs a multiple of {_BLOCK} queries, not {q.shape[1]}'
    refusals['chunked'] = reason
  if implementation is not None:
    if implementation not in IMPLEMENTATIONS:
      raise ValueError(
        f'implementation={implementation!r} is not one of {", ".join(IMPLEMENTATIONS)}.'
      )
    if refusals[implementation]:
      raise NotImplementedError(f'{refusals[implementation]}.')
    return implementation
  if q.shape[1] <= _BLOCK and not mosaic.on_hopper():
    return 'reference'
  by = next(name for name in ('mosaic', 'cudnn', 'chunked', 'reference') if not refusals[name])
  if by != 'mosaic' and mosaic.on_hopper():
    _log_fallback(by, str(refusals['mosaic']))
  return by


@functools.cache
def _log_fallback(by: str, reason: str) -> None:
  _log.info('attention: %s instead of mosaic, which %s.', by, reason)


def masked_attention(
  q_BSHC: Float[Array, 'B S H C'],
  k_BTHC: Float[Array, 'B T H C'],
  v_BTHV: Float[Array, 'B T H V'],
  mask_BST: Bool[Array, 'B S T'],
  *,
  scale: float,
) -> Float[Array, 'B S H V']:
  """Attention over the keys that a mask names, at least one a query; makes scores of all pairs."""
  return reference.attention(q_BSHC, k_BTHC, v_BTHV, mask_BST, scale=scale)
