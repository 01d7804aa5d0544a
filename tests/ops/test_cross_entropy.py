"""The loss against NumPy in float64, whole and in chunks."""

# B batch  S sequence  D model  V vocabulary

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.cross_entropy import num_chunks, token_losses, total_loss

B, S, D, V = 2, 24, 8, 31


def make(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (B, S, D)).astype(dtype)
  head = jax.random.normal(keys[1], (D, V)).astype(dtype)
  target = jax.random.randint(keys[2], (B, S), 0, V)
  return hidden, head, target, jax.random.bernoulli(keys[3], 0.7, (B, S))


def written_out(hidden, head, target):
  hidden, head = (np.asarray(a.astype(jnp.float32), np.float64) for a in (hidden, head))
  logits = hidden @ head
  logits -= logits.max(-1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -np.take_along_axis(log_p, np.asarray(target)[..., None], -1)[..., 0]


def test_token_losses_equal_the_formula():
  hidden, head, target, _ = make()
  np.testing.assert_allclose(
    token_losses(hidden, head, target), written_out(hidden, head, target), rtol=1e-5, atol=1e-5
  )


def test_total_loss_sums_where_the_mask_is_true():
  hidden, head, target, mask = make()
  expected = written_out(hidden, head, target)[np.asarray(mask)].sum()
  np.testing.assert_allclose(total_loss(hidden, head, target, mask), expected, rtol=1e-6)


@pytest.mark.parametrize('chunk', [1, 8, 12])
def test_chunks_give_the_whole_loss_and_its_gradients(chunk):
  hidden, head, target, mask = make()

  def run(chunk):
    loss = lambda hidden, head: total_loss(hidden, head, target, mask, chunk=chunk)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)

  (whole, whole_grads), (parts, parts_grads) = run(S), run(chunk)
  np.testing.assert_allclose(parts, whole, rtol=1e-6)
  for found, expected in zip(parts_grads, whole_grads, strict=True):
    np.testing.assert_allclose(found, expected, atol=5e-6)


@pytest.mark.parametrize(('most', 'expected'), [(48, 1), (47, 2), (7, 8), (5, 12), (1, 48)])
def test_chunks_are_equal_and_no_larger_than_asked(most, expected):
  assert num_chunks(48, most) == expected


def test_gradients_are_those_of_the_definition():
  hidden, head, target, mask = make()

  def definition(hidden, head):
    return jnp.where(mask, token_losses(hidden, head, target), 0).sum()

  found = jax.grad(lambda *a: 3 * total_loss(*a, target, mask, chunk=8), (0, 1))(hidden, head)
  expected = jax.grad(lambda *a: 3 * definition(*a), (0, 1))(hidden, head)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_masked_positions_get_no_gradient_whatever_their_loss():
  hidden, head, target, mask = make()
  hidden = jnp.where(mask[..., None], hidden, 1e4)
  loss, grad = jax.value_and_grad(total_loss)(hidden, head, target, mask)
  assert np.isfinite(loss)
  np.testing.assert_array_equal(np.asarray(grad)[~np.asarray(mask)], 0)


def test_nothing_to_predict_is_a_loss_of_zero():
  hidden, head, target, mask = make()
  assert total_loss(hidden, head, target, jnp.zeros_like(mask)) == 0


def test_loss_of_bfloat16_is_computed_in_float32():
  hidden, head, target, _ = make(jnp.bfloat16)
  loss = token_losses(hidden, head, target)
  assert loss.dtype == jnp.float32
  # products of two bfloat16 are exact in float32
  np.testing.assert_allclose(loss, written_out(hidden, head, target), rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite():
  hidden, head, target, mask = make()
  loss, grad = jax.value_and_grad(total_loss)(hidden * 1e4, head, target, mask)
  assert np.isfinite(loss)
  assert np.isfinite(grad).all()
