"""Dense causal attention that never crosses a document's border."""

from jaxtyping import Array, Bool, Float, Int

from moe_jax.ops.attention import chunked, cudnn, reference
from moe_jax.ops.attention.reference import latent_attention, visible

__all__ = ['attention', 'latent_attention', 'masked_attention', 'visible']

# B batch  S queries  T keys  H heads  C key width  V value width

IMPLEMENTATIONS = ('reference', 'chunked', 'cudnn')
_BLOCK = 512


def attention(
  q_BSHC: Float[Array, 'B S H C'],
  k_BTHC: Float[Array, 'B T H C'],
  v_BTHV: Float[Array, 'B T H V'],
  q_segment_BS: Int[Array, 'B S'],
  k_segment_BT: Int[Array, 'B T'],
  start_B: Int[Array, 'B'],
  *,
  scale: float,
  implementation: str | None = None,
) -> Float[Array, 'B S H V']:
  """Attention of each query over the keys of its own document up to itself.

  Args:
    q_segment_BS: document number of every query; k_segment_BT likewise of every key.
    start_B: index of the first query among the keys (0 without a cache).
    scale: what the products are multiplied by before the softmax.
    implementation: `reference`; `chunked`, memory linear in the sequence; or `cudnn`, fused, on
      GPUs in 16 bits. By default the fastest that can.

  Raises:
    NotImplementedError: the named implementation cannot take these operands; it says why.
    ValueError: an unknown implementation.
  """
  S = q_BSHC.shape[1]
  if implementation is None:
    implementation = 'chunked' if S > _BLOCK and S % _BLOCK == 0 else 'reference'
    if S > _BLOCK and cudnn.refusal(q_BSHC, k_BTHC, v_BTHV) is None:
      implementation = 'cudnn'
  if implementation == 'cudnn':
    reason = cudnn.refusal(q_BSHC, k_BTHC, v_BTHV)
    if reason:
      raise NotImplementedError(f'{reason}.')
    return cudnn.attention(q_BSHC, k_BTHC, v_BTHV, q_segment_BS, scale=scale)
  if implementation == 'chunked':
    if S % _BLOCK:
      raise NotImplementedError(f'chunked attention needs a multiple of {_BLOCK} queries, not {S}.')
    return chunked.attention(
      q_BSHC, k_BTHC, v_BTHV, q_segment_BS, k_segment_BT, start_B, scale=scale, block=_BLOCK
    )
  if implementation != 'reference':
    raise ValueError(
      f'implementation={implementation!r} is not one of {", ".join(IMPLEMENTATIONS)}.'
    )
  mask_BST = visible(q_segment_BS, k_segment_BT, start_B)
  return reference.attention(q_BSHC, k_BTHC, v_BTHV, mask_BST, scale=scale)


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
