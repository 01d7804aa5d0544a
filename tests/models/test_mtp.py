"""Multi-token prediction looks only where it may.

That it equals the published models' is tests/interop/test_ahead.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding as sh
from moe_jax.config import MLAConfig, ModelConfig, MoEConfig, MTPConfig
from moe_jax.models import mtp
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Decoder, head_DV
from moe_jax.precision import policy

# B batch  S sequence  V vocabulary

SMALL = dict(vocab_size=8, d_model=8, num_layers=1, num_dense_layers=1, d_ff=8)


def where_of(token_BS, segment_BS=None) -> Where:
  token_BS = jnp.asarray(token_BS, jnp.int32)
  ones_BS = jnp.ones_like(token_BS)
  segment_BS = ones_BS if segment_BS is None else jnp.asarray(segment_BS, jnp.int32)
  return Where(token_BS, jnp.cumsum(ones_BS, 1) - 1, segment_BS, ones_BS[:, 0] * 0)


@functools.cache
def small():
  """A model with two modules, its variables on one device, and token ids [2, 23]."""
  cfg = ModelConfig(
    vocab_size=97,
    d_model=16,
    num_layers=2,
    d_ff=24,
    init_std=0.3,
    mla=MLAConfig(num_heads=2, d_nope=8, d_rope=4, d_value=8, kv_rank=8),
    moe=MoEConfig(num_experts=4, top_k=2, d_expert=8),
    mtp=MTPConfig(num_modules=2),
  )
  model = Decoder(cfg, policy('float32'))
  ids = np.random.default_rng(0).integers(97, size=(2, 23))
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    variables = jax.jit(model.init)(jax.random.key(0), where_of(ids))
  return model, variables, ids


@functools.cache
def _logits():
  model, _, _ = small()

  def logits(variables, where):
    """The main model's, then every module's."""
    out = model.apply(variables, where)
    head = head_DV(variables['params'], model.policy)
    return [jnp.einsum('bsd,dv->bsv', h, head) for h in (out.hidden_BSD, *out.mtp_hidden)]

  return jax.jit(logits)


def logits_of(token_BS, segment_BS=None) -> list[np.ndarray]:
  _, variables, _ = small()
  with jax.set_mesh(sh.make_mesh((1, 1, 1))), jax.default_matmul_precision('highest'):
    where = where_of(token_BS, segment_BS)
    return [np.asarray(a) for a in _logits()(variables, where)]


@pytest.mark.slow
def test_module_k_sees_k_tokens_ahead_and_no_further():
  ids = small()[2].copy()
  before, at = logits_of(ids), 12
  ids[:, at] = (ids[:, at] + 1) % 97
  for k, (a, b) in enumerate(zip(before, logits_of(ids), strict=True)):
    np.testing.assert_array_equal(a[:, : at - k], b[:, : at - k])
    assert (a[:, at - k] != b[:, at - k]).any(-1).all()


@pytest.mark.slow
def test_documents_in_one_row_give_the_logits_of_documents_alone():
  ids = small()[2]
  together = logits_of(ids, [[1] * 9 + [2] * 14] * len(ids))
  padded = lambda part: np.pad(part, [(0, 0), (0, 23 - part.shape[1])])
  for start, end in ((0, 9), (9, 23)):
    segment = np.zeros_like(ids)
    segment[:, : end - start] = 1
    alone = logits_of(padded(ids[:, start:end]), segment)
    for k in range(3):
      n = end - start - k
      # positions count from the row's start here, so rotations differ by rounding
      np.testing.assert_allclose(
        together[k][:, start : start + n], alone[k][:, :n], rtol=0, atol=1e-5
      )


def test_targets_stay_within_their_document():
  batch = {
    'targets': jnp.array([[11, 12, 20, 21, 22, 0]]),
    'segments': jnp.array([[1, 1, 2, 2, 2, 0]]),
    # 12 -> 20 crosses a border, 22 is the last token of the second document
    'loss_mask': jnp.array([[True, False, True, True, True, False]]),
  }
  target_BS, mask_BS = mtp.targets(batch, 1)
  np.testing.assert_array_equal(mask_BS, [[False, False, True, True, False, False]])
  np.testing.assert_array_equal(target_BS[mask_BS], [21, 22])
  target_BS, mask_BS = mtp.targets(batch, 2)
  np.testing.assert_array_equal(mask_BS, [[False, False, True, False, False, False]])
  np.testing.assert_array_equal(target_BS[mask_BS], [22])
  assert not mtp.targets(batch, 9)[1].any()


@pytest.mark.parametrize(('field', 'value'), [('num_modules', -1), ('loss_weight', -0.1)])
def test_config_refuses_negative_values(field, value):
  with pytest.raises(ValueError, match=f'model.mtp.{field}'):
    MTPConfig(**{field: value})


@pytest.mark.slow
def test_modules_leave_the_decoders_first_parameters_as_they_are():
  where = where_of(np.zeros((1, 4)))
  plain, ahead = (
    Decoder(ModelConfig(**SMALL, mtp=MTPConfig(num_modules=n)), policy('float32')) for n in (0, 2)
  )
  with jax.set_mesh(sh.make_mesh((1, 1, 1))):
    want, got = (jax.jit(m.init)(jax.random.key(0), where)['params'] for m in (plain, ahead))
  assert set(got) - set(want) == {'mtp_1', 'mtp_2'}
  jax.tree.map(np.testing.assert_array_equal, {name: got[name] for name in want}, want)
