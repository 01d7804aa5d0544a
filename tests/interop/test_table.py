"""The tables cover our parameters exactly, and a folder of published names covers the model."""

import json

import numpy as np
import pytest
from checkpoints import GOLDEN, V1, V2, V3
from numpy_deepseek import tensor_shapes as published_shapes

from moe_jax import interop
from moe_jax.interop import families
from moe_jax.interop.fields import Fields, read_rope, write_rope
from moe_jax.interop.safetensors import SINGLE, Plan, Writer, read_header
from moe_jax.interop.table import Link, from_leaf, links, tensor_shape, to_leaf
from moe_jax.interop.variables import leaf_shapes


def model(config, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(config))
  f = Fields(tmp_path / 'config.json')
  family = families.by_type(f)
  return family, family.read_config(f)


@pytest.mark.parametrize('style', ['published', 'packed'])
@pytest.mark.parametrize('config', [V1, V2, V3], ids=['V1', 'V2', 'V3'])
def test_every_element_of_every_leaf_is_named_once(config, style, tmp_path):
  family, cfg = model(config, tmp_path)
  shapes = leaf_shapes(cfg)
  counts = {name: np.zeros(shape, int) for name, shape in shapes.items()}
  for link in links(family.scopes(cfg, style), shapes):
    counts[link.leaf][link.leaf_at][link.leaf_part] += 1
  assert all((count == 1).all() for count in counts.values())


@pytest.mark.parametrize('config', [V1, V2, V3], ids=['V1', 'V2', 'V3'])
def test_published_names_and_shapes_are_those_of_the_papers(config, tmp_path):
  family, cfg = model(config, tmp_path)
  shapes = leaf_shapes(cfg)
  found = links(family.scopes(cfg, 'published'), shapes)
  expected = {link.tensor: tensor_shape(link, shapes) for link in found if link.tensor}
  assert expected == published_shapes(config)


def test_a_part_of_an_axis_goes_there_and_back():
  shapes = {'leaf': (5, 2, 3)}
  link = Link('leaf', (), (), 'tensor', (), (), '(h x) r -> r h x', ('x', 4, 7))
  assert tensor_shape(link, shapes) == (14, 5)
  tensor = np.arange(70.0).reshape(14, 5)
  leaf = to_leaf(link, shapes, tensor)
  assert leaf.shape == (5, 2, 3) and leaf[3, 1, 2] == tensor[7 + 4 + 2, 3]
  back = np.full((14, 5), -1.0)
  from_leaf(link, shapes, leaf, back)
  rows = [4, 5, 6, 11, 12, 13]
  np.testing.assert_array_equal(back[rows], tensor[rows])
  assert (np.delete(back, rows, 0) == -1).all()


def test_one_entry_of_an_axis_can_be_taken():
  link = Link('leaf', (), (), 'tensor', (), (), 'd (two x) -> x d', ('two', 1, 2))
  tensor = np.arange(24.0).reshape(4, 6)
  np.testing.assert_array_equal(to_leaf(link, {'leaf': (3, 4)}, tensor), tensor[:, 3:].T)


@pytest.mark.parametrize('case', ['v2', 'v3'])
def test_rope_is_written_as_it_was_read(case, tmp_path):
  rope = read_rope(Fields(GOLDEN / case / 'config.json'))
  assert rope.yarn_factor == 40 and rope.yarn_original_length == 64
  (tmp_path / 'config.json').write_text(json.dumps(write_rope(rope)))
  assert read_rope(Fields(tmp_path / 'config.json')) == rope


def test_rope_magnitude_survives(tmp_path):
  yarn = dict(rope_type='yarn', factor=4, original_max_position_embeddings=16, attention_factor=1.5)
  (tmp_path / 'config.json').write_text(json.dumps(dict(rope_scaling=yarn)))
  rope = read_rope(Fields(tmp_path / 'config.json'))
  assert rope.yarn_magnitude == 1.5 and rope.yarn_mscale_all_dim == 0
  (tmp_path / 'config.json').write_text(json.dumps(write_rope(rope)))
  assert read_rope(Fields(tmp_path / 'config.json')) == rope


def test_model_of_no_generation_says_what_each_one_misses(tmp_path):
  _, cfg = model(V3, tmp_path)
  mixed = type(cfg)(**{**cfg.__dict__, 'attention_per_layer': ('mla', 'full')})
  with pytest.raises(interop.InteropError, match=r'deepseek_v3: its attention should be mla'):
    families.for_model(mixed)


def test_tensors_are_aligned_and_shards_hold_what_they_may(tmp_path):
  plans = {f't{i}': Plan(np.dtype(kind), (3,)) for i, kind in enumerate(('u1', 'f4', 'f2', 'i8'))}
  with Writer(tmp_path, plans) as writer:
    for name, plan in plans.items():
      writer.write(name, np.arange(3, dtype=plan.dtype))
  for tensor in read_header(tmp_path / SINGLE).values():
    assert tensor.offset % tensor.dtype.itemsize == 0
    np.testing.assert_array_equal(tensor.read(), [0, 1, 2])
    assert tensor.read((1,)) == 1
