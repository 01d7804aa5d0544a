"""Multi-token prediction of V3 and V4 comes from published tensors and goes back to them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import GOLDEN, contents, write

from moe_jax import interop
from moe_jax.interop.errors import InteropError
from moe_jax.interop.variables import one_device
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Decoder, head_DV
from moe_jax.precision import policy

# float32 against the published float32, logits of order 1.5
TOLERANCE = 1e-5


@functools.cache
def published(case: str):
  """config.json and tensors by their published names, and what the golden says they compute."""
  arrays = dict(np.load(GOLDEN / f'{case}.npz'))
  tensors = {n.removeprefix('w.'): a for n, a in arrays.items() if n.startswith('w.')}
  if case == 'v4_mtp':
    # the golden's model is the one of the folder, by its official names, its tables in float32
    tensors = {n: a.astype(np.int32) if 'tid2eid' in n else a for n, a in tensors.items()}
    config = json.loads((GOLDEN / 'v4' / 'config.json').read_text())
    return config, tensors, arrays
  config = json.loads((GOLDEN / 'v3_mtp.json').read_text())
  for name, a in arrays.items():
    if name.startswith('mtp.layers.'):
      _, _, k, rest = name.split('.', 3)
      rest = rest.removeprefix('mtp_block.').replace('post_norm', 'shared_head.norm')
      tensors[f'model.layers.{3 + int(k)}.{rest}'] = a
  for number in (3, 4):
    for copy, of in (('embed_tokens', 'model.embed_tokens'), ('shared_head.head', 'lm_head')):
      tensors[f'model.layers.{number}.{copy}.weight'] = tensors[f'{of}.weight']
  return config, tensors, arrays


@pytest.fixture(params=['v3_mtp', 'v4_mtp'])
def case(request):
  return request.param


def test_logits_of_every_module_equal_the_goldens(case, tmp_path):
  config, tensors, arrays = published(case)
  with jax.set_mesh(one_device()), jax.default_matmul_precision('highest'):
    cfg, variables = interop.load(write(tmp_path / 'a', config, tensors))
    model, token_BS = Decoder(cfg, policy('float32')), jnp.asarray(arrays['ids'], jnp.int32)
    ones_BS = jnp.ones_like(token_BS)
    where = Where(token_BS, jnp.cumsum(ones_BS, 1) - 1, ones_BS, ones_BS[:, 0] * 0)

    @jax.jit
    def logits(variables):
      out, head = model.apply(variables, where), head_DV(variables['params'], model.policy)
      return [jnp.einsum('bsd,dv->bsv', h, head) for h in (out.hidden_BSD, *out.mtp_hidden)]

    main, *ahead = [np.asarray(a) for a in logits(variables)]
  if case == 'v3_mtp':
    wanted = [arrays['mtp_logits_1'], arrays['mtp_logits_2']]
    main_wanted = arrays['hidden_after_final_norm'] @ tensors['lm_head.weight'].T
  else:
    wanted, main_wanted = [arrays['mtp_logits']], arrays['logits']
  errors = [np.abs(main - main_wanted).max()]
  for k, (got, want) in enumerate(zip(ahead, wanted, strict=True), start=1):
    errors.append(np.abs(got[:, : want.shape[1]] - want).max())
    assert want.shape[1] == main.shape[1] - k
  print(case, errors)
  assert max(errors) < TOLERANCE, errors


def test_a_round_trip_keeps_every_tensor_bit_for_bit(case, tmp_path):
  config, tensors, _ = published(case)
  with jax.set_mesh(one_device()):
    cfg, variables = interop.load(write(tmp_path / 'a', config, tensors))
    interop.save(cfg, variables, tmp_path / 'b', packed=case == 'v3_mtp')
    again_cfg, again = interop.load(tmp_path / 'b')
  assert contents(tmp_path / 'b') == contents(tmp_path / 'a')
  assert again_cfg.mtp == cfg.mtp and cfg.mtp.num_modules > 0
  jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_a_config_that_counts_modules_without_tensors_gives_a_model_without():
  with jax.set_mesh(one_device()):
    cfg, variables = interop.load(GOLDEN / 'v3')
  assert json.loads((GOLDEN / 'v3' / 'config.json').read_text())['num_nextn_predict_layers'] == 1
  assert cfg.mtp.num_modules == 0 and 'mtp_1' not in variables['params']


def test_a_missing_tensor_of_a_module_is_named(case, tmp_path):
  config, tensors, _ = published(case)
  name = next(n for n in tensors if n.endswith('hnorm.weight'))
  folder = write(tmp_path / 'a', config, {n: a for n, a in tensors.items() if n != name})
  with pytest.raises(InteropError, match=name.replace('.', r'\.')):
    interop.load(folder)
