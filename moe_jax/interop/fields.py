"""Reading a checkpoint's config.json: every field is used, known to change nothing, or refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from moe_jax.config import RopeConfig
from moe_jax.config_io import nearest
from moe_jax.interop.errors import InteropError

# what says nothing about the function that the weights compute
_HARMLESS = """
  _attn_implementation _name_or_path add_cross_attention architectures attention_dropout auto_map
  aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
  cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
  early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size exponential_decay_length_penalty
  finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout id2label
  initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
  max_position_embeddings max_window_layers min_length model_type name_or_path
  no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
  output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
  problem_type pruned_heads qk_head_dim quantization_config remove_invalid_values
  repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef
  router_jitter_noise sep_token_id seq_aux suppress_tokens task_specific_params temperature
  tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
  transformers_version typical_p use_bfloat16 use_cache
"""
_MISSING = object()


class Fields:
  """config.json, read field by field; `finish` refuses what nobody asked for."""

  def __init__(self, path: Path):
    self.path = path
    try:
      values = json.loads(path.read_text())
    except FileNotFoundError:
      raise InteropError(f'{path} is missing: a checkpoint folder has a config.json.') from None
    except ValueError:
      values = None
    if not isinstance(values, dict):
      raise InteropError(f'{path} is damaged: it should be a JSON object.')
    self.values: dict[str, Any] = values
    self._asked: set[str] = set()

  def fail(self, name: str, rule: str) -> InteropError:
    value = self.values.get(name, _MISSING)
    shown = name if value in (None, _MISSING) else f'{name}={json.dumps(value)}'
    return InteropError(f'{self.path}: {shown} {rule}')

  def get(self, name: str, kind: type, default: Any = _MISSING) -> Any:
    """The field as int, float, bool, str or dict; null or absent gives the default."""
    self._asked.add(name)
    value = self.values.get(name)
    if value is None:
      if default is _MISSING:
        raise self.fail(name, f'is missing: it should be of type {kind.__name__}.')
      return default
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      raise self.fail(name, f'should be of type {kind.__name__}.')
    return value

  def must(self, name: str, *allowed: Any) -> None:
    """Refuses a field that is there with any other value than these; null counts as absent."""
    self._asked.add(name)
    value = self.values.get(name)
    if value is not None and value not in allowed:
      shown = ' or '.join(json.dumps(a) for a in allowed)
      raise self.fail(name, f'is not supported: it should be {shown}.')

  def ignore(self, *names: str) -> None:
    self._asked.update(names)

  def finish(self) -> None:
    """Refuses fields that are neither asked for nor harmless, except those switched off."""
    for name, value in self.values.items():
      if name in self._asked or name in _HARMLESS.split() or value is None or value is False:
        continue
      raise self.fail(name, f'is not a field that this model_type supports. '
                            f'{nearest(name, self._asked)}')  # fmt: skip

  def fp8_block(self) -> tuple[int, int]:
    """Rows and columns that share a scale, should there be FP8 tensors."""
    name = 'quantization_config'
    q = self.get(name, dict, {})
    if q.get('quant_method', 'fp8') != 'fp8' or q.get('fmt', 'e4m3') not in ('e4m3', 'e5m2'):
      raise self.fail(name, 'is not supported: quant_method should be "fp8", fmt "e4m3".')
    if q.get('activation_scheme', 'dynamic') != 'dynamic':
      raise self.fail(name, 'is not supported: activation_scheme should be "dynamic".')
    block = q.get('weight_block_size') or [128, 128]
    if len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
      raise self.fail(name, 'should have a weight_block_size of two positive integers.')
    return block[0], block[1]


def read_rope(f: Fields) -> RopeConfig:
  """Rotary embeddings of either style: rope_parameters, or rope_theta beside rope_scaling.

  What is left out follows transformers: without both mscale and mscale_all_dim, YaRN scales cos and
  sin by 0.1 ln(factor) + 1; the softmax is scaled by mscale_all_dim alone.
  """
  theta = f.get('rope_theta', float, 10_000.0)
  old, new = f.get('rope_scaling', dict, {}), f.get('rope_parameters', dict, {})
  name, rope = ('rope_parameters', new) if new else ('rope_scaling', old)
  theta = float(rope.get('rope_theta', theta))
  kind = rope.get('rope_type', rope.get('type', 'default'))
  known = {'rope_type', 'type', 'rope_theta', 'factor', 'beta_fast', 'beta_slow', 'mscale',
           'mscale_all_dim', 'original_max_position_embeddings', 'attention_factor', 'truncate',
           'partial_rotary_factor'}  # fmt: skip
  for key, value in rope.items():
    if key not in known and value is not None:
      raise f.fail(name, f'has {key}, which is not supported.')
  if rope.get('partial_rotary_factor') not in (None, 1, 1.0) or rope.get('truncate') is False:
    raise f.fail(name, 'is not supported: partial_rotary_factor should be 1, truncate true.')
  if kind == 'default':
    return RopeConfig(base=theta)
  if kind != 'yarn':
    raise f.fail(name, 'is not supported: its type should be "default" or "yarn".')
  longest = f.get('max_position_embeddings', int, 0)
  length = rope.get('original_max_position_embeddings') or longest
  if not length:
    raise f.fail(name, 'should have original_max_position_embeddings.')
  factor = rope.get('factor') or longest / length
  if factor < 1:
    raise f.fail(name, 'should have a factor of at least 1.')
  if factor == 1:
    return RopeConfig(base=theta)
  plain = RopeConfig(
    base=theta,
    yarn_factor=float(factor),
    yarn_original_length=length,
    yarn_beta_fast=float(rope.get('beta_fast') or 32),
    yarn_beta_slow=float(rope.get('beta_slow') or 1),
  )
  m, all_dim = rope.get('mscale'), rope.get('mscale_all_dim') or 0.0
  magnitude = rope.get('attention_factor')
  if magnitude is None:
    both = (m, all_dim) if m and all_dim else (1.0, 0.0)
    up, down = (0.1 * m * math.log(factor) + 1 for m in both)
    magnitude = up / down
  return dataclasses.replace(
    plain, yarn_mscale_all_dim=float(all_dim), yarn_magnitude=float(magnitude)
  )


def write_rope(rope: RopeConfig) -> dict[str, Any]:
  """The older style, which every version of transformers, vLLM and SGLang reads."""
  if rope.yarn_factor == 1:
    return {'rope_theta': rope.base, 'rope_scaling': None}
  m = rope.yarn_mscale_all_dim
  scaling = {
    'type': 'yarn',
    'rope_type': 'yarn',
    'factor': rope.yarn_factor,
    'original_max_position_embeddings': rope.yarn_original_length,
    'beta_fast': rope.yarn_beta_fast,
    'beta_slow': rope.yarn_beta_slow,
    'mscale_all_dim': m,
  }
  # mscale is what DeepSeek's code reads, attention_factor what transformers prefers to it
  if m and rope.yarn_magnitude == 1:
    scaling['mscale'] = m
  else:
    scaling['attention_factor'] = rope.yarn_magnitude
  return {'rope_theta': rope.base, 'rope_scaling': scaling}
