"""Hash layers: a token's experts are fixed by its id."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Int

from moe_jax.ops.route import hash_table
from moe_jax.routing.base import Gate, Idea, Sizes, State

# V token ids  B batch  S sequence  K experts a token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hash(Idea):
  """A random, frozen table from token ids to K distinct experts, equally many ids for each expert.

  The gate still weighs the experts. Balance is that of the tokens' frequencies, so a frequent token
  crowds its experts; nothing can collapse. DeepSeek-V4's first layers do this alone:
  `model.moe.num_hash_layers`.

  Source: Roller et al. 2021, arXiv:2106.04426, section 3.2 (random and balanced hashing). Tested:
  its premise, that routing depends on the id alone and not on training.
  """

  name: ClassVar[str] = 'hash'

  def init(self, key: jax.Array, sizes: Sizes) -> State:
    K, E = sizes.top_k, sizes.num_experts
    return {'expert_VK': hash_table(key, num_ids=sizes.vocab_size, top_k=K, num_experts=E)}

  def choose(self, gate: Gate, state: State) -> tuple[Int[Array, 'B S K'], None]:
    tokens = jax.typeof(gate.token_BS).sharding.spec
    rows = jax.P(*tokens, None)
    return state['expert_VK'].at[gate.token_BS].get(out_sharding=rows), None
