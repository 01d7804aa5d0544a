"""Loading a checkpoint, computing its logits, and saving one."""

import contextlib
import logging
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ATTENTION_KINDS, COMPRESSED_KINDS, ModelConfig
from moe_jax.config_io import flatten, to_dict
from moe_jax.interop.checkpoint import Checkpoint
from moe_jax.interop.errors import InteropError
from moe_jax.interop.folders import new_folder
from moe_jax.interop.native import Native, is_native
from moe_jax.interop.published import Export
from moe_jax.interop.variables import InMemory, Source, materialize, one_device
from moe_jax.models.attention import Where
from moe_jax.models.decoder import Decoder, Output, head_DV
from moe_jax.precision import policy

# B batch  S sequence  V vocabulary

_log = logging.getLogger(__name__)


def load(folder: Path | str) -> tuple[ModelConfig, Any]:
  """Reads a checkpoint: its config, and its variables on the current mesh, float32.

  The folder is one for transformers, or one that import_hf made.

  Without a current mesh everything goes to one device. Leaf by leaf: beside what is loaded, a
  process holds its share of one leaf.

  Raises:
    InteropError: before anything is read, where the folder is not a whole, supported checkpoint.
  """
  source = open_source(folder)
  empty = jax.sharding.get_mesh().empty
  with jax.set_mesh(one_device()) if empty else contextlib.nullcontext():
    return source.cfg, materialize(source)


def open_source(folder: Path | str) -> Source:
  """Opens and checks a folder without reading its tensors."""
  if is_native(Path(folder)):
    return Native(folder)
  source = Checkpoint(folder)
  for what, count in source.left_out.items():
    _log.warning('%s: %d tensors of %s are left out', folder, count, what)
  return source


def open_for(cfg: ModelConfig, folder: Path | str) -> Source:
  """Opens a folder to start training `cfg` from; raises InteropError where it is another model."""
  source = open_source(folder)
  ours, theirs = _function(cfg), _function(source.cfg)
  differ = [n for n in ours | theirs if ours.get(n) != theirs.get(n)]
  if differ:
    shown = ', '.join(f'model.{n}={ours.get(n)} (there {theirs.get(n)})' for n in differ)
    raise InteropError(f'init_from={folder} holds another model than this config: {shown}.')
  return source


def _function(cfg: ModelConfig) -> dict[str, Any]:
  """The fields that say what a model computes: not how it is trained, nor of kinds it has not."""
  fields = to_dict(cfg)
  used = {kind for layer in cfg.layers for kind in (layer.attention, layer.feed_forward)}
  if used & set(COMPRESSED_KINDS):
    used.add('compressed')
  if any(kind.startswith('moe') for kind in used):
    used.add('moe')
  for group in {*ATTENTION_KINDS, 'compressed', 'moe'} - {*COMPRESSED_KINDS, *used}:
    fields.pop(group)
  for name in ('init_std', 'remat', 'attention_per_layer'):
    fields.pop(name)
  return flatten(fields | {'attention': [layer.attention for layer in cfg.layers]})


def logits(folder: Path | str, ids: Any) -> np.ndarray:
  """float32 logits [B, S, V] of token ids [B, S], computed on the CPU whatever else there is."""
  ids_BS = np.asarray(ids)
  if ids_BS.ndim != 2 or not np.issubdtype(ids_BS.dtype, np.integer):
    raise ValueError(f'ids should be integers [B, S], not {ids_BS.dtype}{list(ids_BS.shape)}.')
  with jax.set_mesh(one_device('cpu')), jax.default_matmul_precision('highest'):
    cfg, variables = load(folder)
    if ids_BS.size and not 0 <= ids_BS.min() <= ids_BS.max() < cfg.vocab_size:
      raise ValueError(f'ids should lie in [0, {cfg.vocab_size}), the vocabulary of {folder}.')
    forward = jax.jit(lambda v, t: forward_logits(Decoder(cfg, policy('float32')), v, t))
    return np.asarray(forward(variables, jnp.asarray(ids_BS, jnp.int32)))


def forward_logits(model: Decoder, variables: Any, token_BS: jax.Array) -> jax.Array:
  """Logits of whole rows, each one document. For use under jit, on the current mesh."""
  B, S = token_BS.shape
  position_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
  where = Where(token_BS, position_BS, jnp.ones_like(token_BS), jnp.zeros((B,), jnp.int32))
  out = cast(Output, model.apply(variables, where))
  head = head_DV(variables['params'], model.policy)
  return jnp.einsum('bsd,dv->bsv', out.hidden_BSD, head, preferred_element_type=jnp.float32)


def save(cfg: ModelConfig, variables: Any, folder: Path | str, packed: bool = False) -> None:
  """Writes variables in the published layout, in the dtype they are held in.

  Args:
    variables: {'params': ..., 'router': ...}, sharded or not.
    folder: new or empty; whole or absent afterwards.
    packed: the experts of a layer in one tensor instead of one each.

  Raises:
    InteropError: before anything is written, where no published generation is this model.
  """
  export = Export(InMemory(cfg, variables), packed=packed)
  with new_folder(Path(folder)) as partial:
    export.write(partial)
