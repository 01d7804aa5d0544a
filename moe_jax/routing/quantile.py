"""Quantile balancing: solves for the selection bias instead of stepping it."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.routing.base import Gate, Idea, Seen, State

# L layers  B batch  S sequence  E experts  N bins


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantile(Idea):
  """The bias under which each expert would have won its fair share of the batch just seen.

  alpha_t is token t's (K+1)-th largest biased score, the bar that an expert must clear. Expert j's
  margins s_tj - alpha_t are to be positive for a share K / E of the tokens, so its next bias is
  minus their (1 - K/E)-quantile, less the mean over experts. No step size. With `decay` the bias
  moves only part of the way.

  The quantile is read, interpolated, off a histogram of margins over [-1, 1]: counts add up over
  devices and micro-batches, quantiles do not. Scores lie in [0, 1] (`softmax`, `sigmoid`).

  Source: Jianlin Su's quantile balancing; Kimi K3, arXiv:2607.24653, section 2.3.3 (no decay).
  Tested: the quantile against an exact one, and the claim that a batch routed again is balanced in
  few steps.
  """

  name: ClassVar[str] = 'quantile'
  num_bins: int = 512
  decay: float = 0.0

  def check(self, moe: MoEConfig) -> None:
    if moe.top_k >= moe.num_experts:
      raise ValueError(
        f'balance: quantile needs model.moe.top_k={moe.top_k} below '
        f'num_experts={moe.num_experts}: a token must pass someone over. Lower top_k.'
      )
    if moe.score == 'sqrt_softplus':
      raise ValueError(
        "balance: quantile needs scores in [0, 1], and model.moe.score='sqrt_softplus' has no "
        'upper end. Use softmax or sigmoid.'
      )

  def measure(self, gate: Gate, state: State) -> State:
    bar_BS1 = jax.lax.top_k(gate.score_BSE + gate.bias_E, gate.top_k + 1)[0][..., -1:]
    margin_BSE = jax.lax.stop_gradient(gate.score_BSE - bar_BS1)
    bin_BSE = jnp.clip((margin_BSE + 1) * (self.num_bins / 2), 0, self.num_bins - 1)
    bin_BSE = jnp.where(gate.valid_BS[..., None], bin_BSE.astype(jnp.int32), self.num_bins)
    return {'margins_EN': _histogram(bin_BSE, self.num_bins)}

  def update_bias(
    self, bias_LE: Float[Array, 'L E'], state: State, seen: Seen
  ) -> Float[Array, 'L E']:
    count_LEN = seen.sums['margins_EN']
    target = 1 - seen.top_k / bias_LE.shape[-1]
    new_LE = -quantile_of(count_LEN, target)
    new_LE -= new_LE.mean(-1, keepdims=True)
    # a batch of padding alone says nothing
    seen_any_L1 = count_LEN.sum((-1, -2))[:, None] > 0
    return jnp.where(seen_any_L1, self.decay * bias_LE + (1 - self.decay) * new_LE, bias_LE)


def _histogram(bin_BSE: jax.Array, num_bins: int) -> Float[Array, 'E N']:
  """Tokens in each bin, by expert; `num_bins` is counted nowhere. Whole numbers in float32."""
  E = bin_BSE.shape[-1]
  # a row's own counts, then the sum over rows: rows may lie on different devices
  one_row = lambda bin_SE: jnp.zeros((E, num_bins)).at[jnp.arange(E), bin_SE].add(1.0, mode='drop')
  return jax.vmap(one_row)(bin_BSE).sum(0)


def quantile_of(count_N: Float[Array, '... N'], share: float) -> Float[Array, '...']:
  """Where the histogram over [-1, 1] has `share` of its counts below, straight within a bin."""
  N = count_N.shape[-1]
  below_N = jnp.cumsum(count_N, axis=-1)
  wanted = share * below_N[..., -1:]
  bin_1 = jnp.minimum((below_N < wanted).sum(-1, keepdims=True), N - 1)
  inside = jnp.take_along_axis(count_N, bin_1, axis=-1)
  before = jnp.take_along_axis(below_N, bin_1, axis=-1) - inside
  part = jnp.clip((wanted - before) / jnp.maximum(inside, 1e-9), 0, 1)
  return ((bin_1 + part) * (2 / N) - 1)[..., 0]
